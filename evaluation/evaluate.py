"""Evaluate a denoiser: generate, compare with the reference, and write down the protocol with the numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.encode import ProgressBar
from evaluation.features import FeatureExtractor
from evaluation.generate import Generator, balanced_labels
from evaluation.references import Reference
from evaluation.statistics import FeatureStatistics, frechet_distance


@dataclass(frozen=True)
class Protocol:
    """How a number was measured. Numbers of two protocols are never drawn in one curve."""

    sampler: Mapping[str, Any]  # class and arguments
    guidance: Mapping[str, Any]
    num_images: int
    seed: int
    labels: str = "balanced"


def evaluate(
    generator: Generator,
    extractor: FeatureExtractor,
    reference: Reference,
    protocol: Protocol,
    batch_size: int,
    progress: ProgressBar,
) -> dict[str, Any]:
    """Metrics of ``num_images`` class-balanced samples, with the protocol: one record of evaluations.jsonl.

    Every process must call it; each generates its share and all return the same record. Raises ValueError
    where there are too few images for a covariance.
    """
    labels = balanced_labels(protocol.num_images, generator.spec.num_classes)
    vectors, recognized = [], 0
    with progress("evaluate", 0, protocol.num_images, "img") as bar:
        for indices, images in generator.batches(labels, batch_size):
            features = extractor(images)
            vectors.append(features.vectors)
            if features.classes is not None:
                recognized += int((features.classes == labels[indices]).sum())
            bar.update(len(indices) * generator.runtime.data_world)
    gather = generator.runtime.gather
    statistics = FeatureStatistics.of(gather(np.concatenate(vectors)))
    num_recognized = int(gather(np.array([recognized])).sum())
    return {
        "feature_extractor": extractor.title,
        "feature_extractor_hash": extractor.hash,
        **extractor.facts,
        "reference": reference.name,
        "reference_hash": reference.hash,
        "reference_images": reference.statistics.count,
        "decoder": f"{generator.spec.autoencoder} {generator.spec.autoencoder_revision}",
        "sampler": dict(protocol.sampler),
        "guidance": dict(protocol.guidance),
        "num_images": protocol.num_images,
        "labels": protocol.labels,
        "seed": protocol.seed,
        "frechet_distance": frechet_distance(reference.statistics, statistics),
        "frechet_distance_of_real_resample": reference.floor,
        "recognized_fraction": num_recognized / protocol.num_images,
    }
