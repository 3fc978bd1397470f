"""What generated images are compared with."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.sources import Source, load_images
from diffusion.draws import Philox, Purpose
from evaluation.features import FeatureExtractor
from evaluation.statistics import FeatureStatistics, frechet_distance


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images, and how far a resample of them is from them."""

    name: str
    hash: str  # of the images
    statistics: FeatureStatistics
    floor: float  # Frechet distance of one bootstrap resample: what a perfect generator would get


def make_reference(source: Source, image_size: int, extractor: FeatureExtractor) -> Reference:
    """The reference of all images of a small source."""
    images, _ = load_images(source, image_size)
    vectors = extractor(images).vectors
    statistics = FeatureStatistics.of(vectors)
    resampled = FeatureStatistics.of(vectors[_bootstrap_rows(len(vectors))])
    return Reference(
        name=source.name,
        hash=hashlib.sha256(images.tobytes()).hexdigest(),
        statistics=statistics,
        floor=frechet_distance(statistics, resampled),
    )


def _bootstrap_rows(length: int) -> NDArray[np.int64]:
    return Philox(0).at(0, Purpose.SPLIT, draw=1).integers(length, size=length)
