"""Compute the Inception Score."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evaluation.features.extractor import FeatureExtractor
from evaluation.metrics.collectors import SplitSums, SplitSumsOf
from evaluation.metrics.metric import require_images, require_inception
from evaluation.reference.reference import Reference


class InceptionScore:
    """The mean over splits of exp(mean KL(p(class | image) || p(class))) (Salimans et al. 2016).

    As in ADM's suite, the softmax is over all 1008 outputs without bias, and splits have ``split_size`` images in the
    order of their indices. A split must mix the classes, as balanced and random labels do.
    """

    def __init__(self, split_size: int = 5000) -> None:
        if split_size < 2:
            raise ValueError(f"inception_score.split_size is {split_size}, but it must be at least 2; ADM's is 5000.")
        self.collects = SplitSumsOf(split_size)
        self.settings: Mapping[str, Any] = {"split_size": split_size}

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Raise ValueError for other features, or fewer images than one split."""
        require_inception("inception_score", extractor)
        require_images("inception_score", self.collects.split_size, num_images, "one split")

    def compute(self, samples: SplitSums, reference: Reference, device: torch.device) -> dict[str, float]:
        """Return ``inception_score`` and its standard deviation over splits."""
        marginals = samples.marginals / samples.counts[:, np.newaxis]
        log_marginals = np.log(marginals, out=np.zeros_like(marginals), where=marginals > 0)
        divergences = samples.negative_entropies / samples.counts - (marginals * log_marginals).sum(axis=1)
        scores = np.exp(divergences)
        return {"inception_score": float(scores.mean()), "inception_score_std": float(scores.std())}
