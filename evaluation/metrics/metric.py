"""Define the interface of a metric, and requirements that metrics share."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from evaluation.features.extractor import CaptionScorer, FeatureExtractor
from evaluation.features.inception import InceptionFeatures
from evaluation.metrics.collectors import Collects
from evaluation.reference.reference import Reference


class Metric(Protocol):
    """Compares generated images with a reference."""

    @property
    def collects(self) -> Collects:
        """Return what must be collected of the generated images."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the settings that define the metric, for the record."""
        ...

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Raise ValueError, before images are generated, where the metric cannot be computed from these."""
        ...

    def compute(self, samples: Any, reference: Reference, device: torch.device) -> dict[str, float]:
        """Return numbers by name from what was collected of all images. ``device`` may compute matrix products."""
        ...


class CaptionMetric:
    """The base of a `Metric` of images and their captions.

    Its scorer sees the images while they are generated, and its collector gets the scores as ``Features.captioned``.
    An evaluation has one scorer at most, and is refused where its images have no captions.
    """

    scorer: CaptionScorer


def require_inception(metric: str, extractor: FeatureExtractor) -> None:
    """Raise ValueError for a metric that is defined on the 2015 Inception network only."""
    if not isinstance(extractor, InceptionFeatures):
        raise ValueError(
            f"{metric} is defined on the 2015 Inception network, but the features are {extractor.title}; choose "
            "evaluation/features=inception, or the metric frechet for a distance in these features."
        )


def require_images(metric: str, needed: int, num_images: int, why: str) -> None:
    """Raise ValueError where there are fewer images than a metric needs."""
    if num_images < needed:
        raise ValueError(
            f"{metric} needs at least {needed} images ({why}), but there are {num_images}; generate more by "
            "evaluation.num_images, or leave the metric out."
        )


def require_reference_images(metric: str, needed: int, reference: Reference, why: str) -> None:
    """Raise ValueError where the reference holds fewer images, or features of them, than a metric needs."""
    if reference.num_vectors < needed:
        raise ValueError(
            f"{metric} needs at least {needed} images ({why}) in the reference, but {reference.name} has "
            f"{reference.num_vectors}; choose a reference with more by evaluation.reference, or leave the metric out."
        )
