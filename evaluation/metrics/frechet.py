"""Compute Frechet distances on any features, and FID and sFID on Inception's."""

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
    """Raise ValueError unless the matrix is a covariance. The root computed for that is cached in ``moments``."""
    _ = moments.root


def _distance(real: Moments, samples: FeatureStatistics, reference: Reference) -> float:
    """Return the distance. Raises ValueError where the reference has features of another dimension."""
    theirs, ours = len(real.mean), len(samples.mean)
    if theirs != ours:
        raise ValueError(
            f"The reference {reference.name} holds a mean of {theirs} numbers, but the extractor gives {ours}; make it "
            "again by `ditscale reference`."
        )
    return frechet_distance(real, samples)


class FrechetDistance:
    """The Frechet distance on the features of any extractor, never called FID."""

    collects = StatisticsOf("vectors")
    settings: Mapping[str, Any] = {}

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Raise ValueError for fewer than 2 images, or a reference whose matrix is not a covariance."""
        require_images("frechet", 2, num_images, _WHY)
        _require_covariance(reference.statistics)

    def compute(self, samples: FeatureStatistics, reference: Reference, device: torch.device) -> dict[str, float]:
        """Return ``frechet_distance``."""
        return {"frechet_distance": _distance(reference.statistics, samples, reference)}


class FrechetInceptionDistance(FrechetDistance):
    """FID (Heusel et al. 2017): the Frechet distance on pool3 of the 2015 Inception, as in ADM's suite."""

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Raise ValueError for other features, fewer than 2 images, or a reference whose matrix is not a covariance."""
        require_inception("fid", extractor)
        require_images("fid", 2, num_images, _WHY)
        _require_covariance(reference.statistics)

    def compute(self, samples: FeatureStatistics, reference: Reference, device: torch.device) -> dict[str, float]:
        """Return ``fid``, and the same number as ``frechet_distance``, the name for any extractor."""
        distance = _distance(reference.statistics, samples, reference)
        return {"fid": distance, "frechet_distance": distance}


class SpatialFrechetInceptionDistance:
    """sFID (Nash et al. 2021): on the first 7 channels of mixed_6's 17x17 map, 2023 features, as in ADM's suite."""

    collects = StatisticsOf("spatial")
    settings: Mapping[str, Any] = {}

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Raise ValueError for other features, fewer than 2 images, or a reference without mu_s and sigma_s."""
        require_inception("sfid", extractor)
        require_images("sfid", 2, num_images, _WHY)
        if reference.spatial is None:
            raise ValueError(
                f"sfid needs mu_s and sigma_s, but the reference {reference.name} has none; make one by "
                "`ditscale reference evaluation/features=inception`, or leave the metric out."
            )
        _require_covariance(reference.spatial)

    def compute(self, samples: FeatureStatistics, reference: Reference, device: torch.device) -> dict[str, float]:
        """Return ``sfid``."""
        assert reference.spatial is not None
        return {"sfid": _distance(reference.spatial, samples, reference)}
