"""Frechet distances: on any features, and the two that carry Inception's name."""

from collections.abc import Mapping
from typing import Any

import torch

from evaluation.features.extractor import FeatureExtractor
from evaluation.metrics.collectors import StatisticsOf
from evaluation.metrics.metric import require_images, require_inception
from evaluation.metrics.statistics import FeatureStatistics, Moments, frechet_distance
from evaluation.reference.reference import Reference

_WHY = "a covariance"


def _require_covariance(moments: Moments) -> None:
    """Raise ValueError for a matrix that is none. What is computed for that stays with ``moments``."""
    _ = moments.root


def _distance(real: Moments, samples: FeatureStatistics, reference: Reference) -> float:
    """Return the distance. Raises ValueError where the reference is of features of another size."""
    theirs, ours = len(real.mean), len(samples.mean)
    if theirs != ours:
        raise ValueError(
            f"The reference {reference.name} holds a mean of {theirs} numbers, but the extractor gives {ours}; make it "
            "again by `ditscale reference`."
        )
    return frechet_distance(real, samples)


class FrechetDistance:
    """Frechet distance in the features of any extractor, never called FID."""

    collects = StatisticsOf("vectors")
    settings: Mapping[str, Any] = {}

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """At least 2 images, and a reference with a covariance."""
        require_images("frechet", 2, num_images, _WHY)
        _require_covariance(reference.statistics)

    def compute(self, samples: FeatureStatistics, reference: Reference, device: torch.device) -> dict[str, float]:
        """``frechet_distance``."""
        return {"frechet_distance": _distance(reference.statistics, samples, reference)}


class FrechetInceptionDistance(FrechetDistance):
    """FID (Heusel et al. 2017): the same on pool3 of the 2015 Inception, as ADM's suite computes it."""

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Inception features, at least 2 images, and a reference with a covariance."""
        require_inception("fid", extractor)
        require_images("fid", 2, num_images, _WHY)
        _require_covariance(reference.statistics)

    def compute(self, samples: FeatureStatistics, reference: Reference, device: torch.device) -> dict[str, float]:
        """``fid``, and the same number as ``frechet_distance``, under which any extractor's stands."""
        distance = _distance(reference.statistics, samples, reference)
        return {"fid": distance, "frechet_distance": distance}


class SpatialFrechetInceptionDistance:
    """sFID (Nash et al. 2021): on the first 7 channels of the 17x17 map of mixed_6, 2023 numbers, as in ADM's suite."""

    collects = StatisticsOf("spatial")
    settings: Mapping[str, Any] = {}

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Inception features, at least 2 images, and a reference with mu_s and sigma_s."""
        require_inception("sfid", extractor)
        require_images("sfid", 2, num_images, _WHY)
        if reference.spatial is None:
            raise ValueError(
                f"sfid needs mu_s and sigma_s, but the reference {reference.name} has none; make one by "
                "`ditscale reference evaluation/features=inception`, or leave the metric out."
            )
        _require_covariance(reference.spatial)

    def compute(self, samples: FeatureStatistics, reference: Reference, device: torch.device) -> dict[str, float]:
        """``sfid``."""
        assert reference.spatial is not None
        return {"sfid": _distance(reference.spatial, samples, reference)}
