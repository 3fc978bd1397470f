"""Define the interface of feature extractors; images are compared by their features."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class Features(NamedTuple):
    """The features of a batch of images. Parts that an extractor does not compute are None."""

    vectors: NDArray[np.float32]  # [B, D]
    classes: NDArray[np.int64] | None = None  # [B], the recognized class, if the extractor knows the data's classes
    spatial: NDArray[np.float32] | None = None  # [B, num_spatial], a flattened map with positions, for sFID
    logits: NDArray[np.float32] | None = None  # [B, num_classes], over the extractor's classes, for Inception Score
    captioned: NDArray[np.float32] | None = None  # [B, 2], of a `CaptionScorer`, where a metric has one

    @classmethod
    def concatenate(cls, batches: "list[Features]") -> "Features":
        """Return the features of all batches, in order."""
        parts = zip(*batches, strict=True)
        return cls(*(None if part[0] is None else np.concatenate(part) for part in parts))  # type: ignore[arg-type]


def require_finite(features: Features, extractor: "FeatureExtractor") -> Features:
    """Return the features. Raises ValueError where a value is not finite, so that statistics are undefined."""
    parts = [part for part in (features.vectors, features.spatial, features.logits) if part is not None]
    bad = np.any([~np.isfinite(part).all(axis=1) for part in parts], axis=0)
    if bad.any():
        raise ValueError(
            f"{bad.sum()} of {len(bad)} images have features ({extractor.title}) that are not finite; use a network or "
            "weights that do not overflow, in float32."
        )
    return features


class FeatureExtractor(Protocol):
    """Maps images to feature vectors. Numbers from two extractors are never compared."""

    title: str  # completes "Frechet distance on ..."; only the 2015 Inception's may be called FID
    hash: str  # identifies the weights
    facts: dict[str, float]  # recorded numbers that help to judge the features, such as an accuracy

    def to(self, device: torch.device) -> None:
        """Compute on ``device`` from now on, if that changes results by no more than rounding."""
        ...

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Return the features of images [B, H, W, C] uint8."""
        ...


class CaptionScorer(Protocol):
    """Compares images with their captions, for a metric, while images are generated."""

    title: str  # for the record
    hash: str  # identifies everything that determines the scores of an image and its caption

    def to(self, device: torch.device) -> None:
        """Compute on ``device`` from now on, if that changes results by no more than rounding."""
        ...

    def __call__(self, images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float32]:
        """Return [B, 2] of images [B, H, W, C] and their captions: their similarity, and 1 for a truncated caption."""
        ...
