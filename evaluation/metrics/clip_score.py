"""Compute the CLIP score of images and their captions."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from evaluation.features.clip import CLIPSimilarity
from evaluation.features.extractor import FeatureExtractor
from evaluation.metrics.collectors import CaptionSums, CaptionSumsOf
from evaluation.metrics.metric import CaptionMetric
from evaluation.reference.reference import Reference


class CLIPScore(CaptionMetric):
    """The mean over images of ``weight`` max(cos(image, caption), 0) in CLIP's embeddings (Hessel et al. 2021, eq. 1).

    Hessel et al. have ``weight`` 2.5 and ``prefix`` "A photo depicts ", which each caption begins with; papers on
    generation of images from text report 100 times the cosine, or the cosine itself, of captions as they are.
    Captions longer than CLIP's limit are truncated. ``folder`` has a CLIP, as `load_clip` takes it.
    """

    collects = CaptionSumsOf()

    def __init__(
        self,
        folder: str,
        tokenizer: str | None = None,
        weight: float = 100.0,
        prefix: str = "",
        batch_size: int = 100,
    ) -> None:
        if not (weight > 0 and math.isfinite(weight)) or batch_size < 1:
            raise ValueError(
                f"clip_score has weight={weight} and batch_size={batch_size}, but needs a weight above 0, such as 100, "
                "and a batch of at least 1."
            )
        scorer = CLIPSimilarity(folder, tokenizer, prefix, batch_size, "evaluation.metric.clip_score")
        self._weight, self.scorer = float(weight), scorer
        self.settings: Mapping[str, Any] = {
            "weight": self._weight,
            "prefix": prefix,
            "weights_sha256": scorer.weights_sha256,
            "clip_hash": scorer.clip_hash,
        }

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Accept any features and reference, of which the score is independent."""

    def compute(self, samples: CaptionSums, reference: Reference, device: torch.device) -> dict[str, float]:
        """Return ``clip_score``, and the number of images whose caption was truncated."""
        return {
            "clip_score": self._weight * samples.positive / samples.count,
            "truncated_captions": samples.truncated,
        }
