"""Evaluate a denoiser: generate, compare with the reference, and write down the protocol with the numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.progress import ProgressBar
from evaluation.features import FeatureExtractor
from evaluation.generate import Generator, balanced_labels
from evaluation.references import Reference
from evaluation.statistics import FeatureStatistics, frechet_distance
from train.runfolder import RunFolder, read_lines


@dataclass(frozen=True)
class MeasurementProtocol:
    """How a number was measured. Numbers of two protocols are never drawn in one curve."""

    sampler: Mapping[str, Any]  # class and arguments
    guidance: Mapping[str, Any]
    num_images: int
    sampling_seed: int
    precision: str  # of the network: fp32 or bf16
    labels: str = "balanced"

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError(
                f"evaluation.num_images is {self.num_images}, but a covariance needs at least 2; set it higher."
            )


@dataclass(frozen=True)
class Evaluator:
    """Measures generated images against a reference."""

    extractor: FeatureExtractor
    reference: Reference
    protocol: MeasurementProtocol
    batch_size: int  # images of a process at once; changes no number

    def evaluate(self, generator: Generator, progress: ProgressBar) -> dict[str, Any]:
        """Metrics of class-balanced samples, with the protocol: most of a record of evaluations.jsonl.

        Every process must call it; each generates its share and all return the same record.
        """
        protocol, runtime = self.protocol, generator.runtime
        labels = balanced_labels(protocol.num_images, generator.spec.num_classes)
        size = len(self.reference.statistics.total)
        statistics, recognized = FeatureStatistics.empty(size), 0
        with progress("evaluate", 0, protocol.num_images, "img") as bar:
            for indices, images in generator.batches(labels, self.batch_size):
                features = self.extractor(images)
                statistics += FeatureStatistics.of(features.vectors)
                if features.classes is not None:
                    recognized += int((features.classes == labels[indices]).sum())
                bar.update(len(indices) * runtime.data_world)
        statistics = statistics.merged(runtime.gather)
        num_recognized = int(runtime.gather(np.array([recognized])).sum())
        return {
            **self._facts(generator),
            "frechet_distance": frechet_distance(self.reference.statistics, statistics),
            "recognized_fraction": num_recognized / protocol.num_images,
        }

    def _facts(self, generator: Generator) -> dict[str, Any]:
        """What a number means: extractor, reference, decoder, protocol."""
        return {
            "feature_extractor": self.extractor.title,
            "feature_extractor_hash": self.extractor.hash,
            **self.extractor.facts,
            "reference": self.reference.name,
            "reference_hash": self.reference.hash,
            "reference_images": self.reference.statistics.count,
            "frechet_distance_of_real_resample": self.reference.floor,
            "decoder": f"{generator.spec.autoencoder} {generator.spec.autoencoder_revision}",
            **asdict(self.protocol),
        }


def distance_records(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of ``evaluations.jsonl`` that hold a distance; others may hold bits per dimension alone."""
    return [line for line in read_lines(folder.evaluations) if "frechet_distance" in line]
