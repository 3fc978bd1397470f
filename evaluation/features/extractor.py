"""Feature extractors, behind one interface: what images are compared in."""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class Features(NamedTuple):
    """What an extractor says of a batch. Parts that it does not know are None."""

    vectors: NDArray[np.float32]  # [B, D]
    classes: NDArray[np.int64] | None = None  # [B], the recognised class, where it knows the data's classes
    spatial: NDArray[np.float32] | None = None  # [B, E], with places kept apart: sFID's
    logits: NDArray[np.float32] | None = None  # [B, K] over the extractor's own classes: the Inception Score's

    @classmethod
    def concatenate(cls, batches: "list[Features]") -> "Features":
        """The features of all batches, in order."""
        parts = zip(*batches, strict=True)
        return cls(*(None if part[0] is None else np.concatenate(part) for part in parts))  # type: ignore[arg-type]


def require_finite(features: Features, extractor: "FeatureExtractor") -> Features:
    """The features. Raises ValueError where they are not all numbers, of which no statistics can be made."""
    parts = [part for part in (features.vectors, features.spatial, features.logits) if part is not None]
    bad = np.any([~np.isfinite(part).all(axis=1) for part in parts], axis=0)
    if bad.any():
        raise ValueError(
            f"{bad.sum()} of {len(bad)} images have features ({extractor.title}) that are not finite; use a network or "
            "weights that do not overflow, in float32."
        )
    return features


class FeatureExtractor(Protocol):
    """Images to feature vectors. A number computed with one is never compared with another's."""

    title: str  # completes "Frechet distance on ..."; only the 2015 Inception's may be called FID
    hash: str  # identity of the weights
    facts: dict[str, float]  # what a reader must know to judge the features, such as an accuracy

    def to(self, device: torch.device) -> None:
        """Compute on ``device`` from now on, if that changes no number that matters."""
        ...

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """[B, H, W, C] uint8."""
        ...
