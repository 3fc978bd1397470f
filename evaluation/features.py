"""Feature extractors, behind one interface: what images are compared in."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Features(NamedTuple):
    """What an extractor says of a batch."""

    vectors: NDArray[np.float32]  # [B, D]
    classes: NDArray[np.int64] | None  # [B], the recognised class, where the extractor knows the data's classes


class FeatureExtractor(Protocol):
    """Images to feature vectors. A number computed with one is never compared with another's."""

    title: str  # completes "Frechet distance on ..."; only the 2015 Inception's may be called FID
    hash: str  # identity of the weights
    facts: dict[str, float]  # what a reader must know to judge the features, such as an accuracy

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """[B, H, W, C] uint8."""
        ...
