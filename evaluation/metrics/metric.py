"""The interface of a metric."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from evaluation.features.extractor import FeatureExtractor
from evaluation.features.inception import InceptionFeatures
from evaluation.metrics.collectors import Collects
from evaluation.reference.reference import Reference


class Metric(Protocol):
    """Compares generated images with a reference. Its attributes are settings that go into the record."""

    @property
    def collects(self) -> Collects:
        """What it must know of the generated images."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a reader must know of how it computes."""
        ...

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Raise ValueError, before anything is generated, where it cannot be computed from these."""
        ...

    def compute(self, samples: Any, reference: Reference, device: torch.device) -> dict[str, float]:
        """Numbers by name, of what was collected of all images. ``device`` may be used for matrix products."""
        ...


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
