"""Evaluate a denoiser: generate, compare with the reference, and write down the protocol with the numbers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from core.batch import Condition
from core.precision import exact_device
from core.progress import ProgressBar
from data.conditions import ConditionSource
from evaluation.chunks import Chunk, ChunkStore, chunks_of
from evaluation.features.extractor import FeatureExtractor, Features, require_finite
from evaluation.generate import Generator
from evaluation.image_files import ImageFiles, NoFiles
from evaluation.metrics.collectors import Collects, start_all
from evaluation.metrics.frechet import FrechetDistance
from evaluation.metrics.metric import Metric
from evaluation.metrics.statistics import Gather
from evaluation.reference.reference import Reference
from train.lines import read_lines
from train.runfolder import RunFolder


@dataclass(frozen=True)
class MeasurementProtocol:
    """How a number was measured. Numbers of two protocols are never drawn in one curve."""

    sampler: Mapping[str, Any]  # class and arguments
    guidance: Mapping[str, Any]
    num_images: int
    sampling_seed: int  # of the noise, and of random labels
    network_precision: str  # fp32, tf32 or bf16; `precision` is a metric
    labels: Literal["balanced", "random"] = "balanced"

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError(
                f"evaluation.num_images is {self.num_images}, but a covariance needs at least 2; set it higher."
            )

    def condition_of(self, conditions: ConditionSource) -> Condition:
        """Return the condition of all images."""
        if self.labels == "balanced":
            return conditions.in_turn(self.num_images)
        return conditions.random(self.num_images, self.sampling_seed)


@dataclass(frozen=True)
class Evaluator:
    """Measures generated images against a reference."""

    extractor: FeatureExtractor
    reference: Reference
    protocol: MeasurementProtocol
    batch_size: int  # images of a process at once, and of a chunk; changes no number
    metrics: Mapping[str, Metric] = field(default_factory=lambda: {"frechet": FrechetDistance()})

    def require(self, image_size: int, num_classes: int) -> None:
        """Raise ValueError, before anything is generated, where the reference or a metric does not fit."""
        self.reference.require(image_size, num_classes)
        for metric in self.metrics.values():
            metric.require(self.extractor, self.reference, self.protocol.num_images)

    def evaluate(
        self,
        generator: Generator,
        progress: ProgressBar,
        store: ChunkStore | None = None,
        files: ImageFiles | None = None,
    ) -> dict[str, Any]:
        """Metrics of the protocol's images, with the protocol: most of a record of evaluations.jsonl.

        Every process must call it; each generates its share and all return the same record. What ``store``
        and ``files`` have already is not generated again.
        """
        self.require(generator.spec.image_size, generator.spec.num_classes)
        protocol, runtime = self.protocol, generator.runtime
        runtime.require_same({"feature extractor": self.extractor.hash, "reference": self.reference.hash})
        store, files = store or ChunkStore(), files or NoFiles()
        condition = protocol.condition_of(generator.conditions)
        classes = generator.conditions.classes(condition)
        collectors = start_all([metric.collects for metric in self.metrics.values()], protocol.num_images)
        recognition = _Recognition()
        files.start(store.plan, runtime.is_main)
        runtime.wait()
        with progress("evaluate", 0, protocol.num_images, "img") as bar:
            for chunk in self._rounds(runtime.data_rank, runtime.data_world):
                features = self._features_of(chunk, generator, condition, store, files)
                if chunk is None or features is None:
                    continue
                for collector in collectors.values():
                    collector.add(chunk.indices, features)
                if classes is not None:
                    recognition.add(classes[chunk.indices], features)
                bar.update((chunk.last - chunk.first) * runtime.data_world)
        runtime.wait()  # until the files of all processes are there
        if runtime.is_main:
            files.finish(chunks_of(protocol.num_images, self.batch_size, 0, 1), classes)
        collected = {kind: collector.merged(runtime.gather) for kind, collector in collectors.items()}
        numbers = _shared(
            lambda: self._numbers(collected, exact_device(runtime.device)), runtime.is_main, runtime.gather
        )
        facts = self._facts(generator)
        assert not facts.keys() & numbers.keys(), "a number must not take the place of a fact"
        return {**facts, **numbers, "recognized_fraction": recognition.merged(runtime.gather)}

    def _rounds(self, rank: int, world: int) -> list[Chunk | None]:
        """The chunks of a process; where others have one more, None at the end."""
        mine: list[Chunk | None] = [*chunks_of(self.protocol.num_images, self.batch_size, rank, world)]
        longest = len(chunks_of(self.protocol.num_images, self.batch_size, 0, world))
        return mine + [None] * (longest - len(mine))

    def _features_of(
        self,
        chunk: Chunk | None,
        generator: Generator,
        condition: Condition,
        store: ChunkStore,
        files: ImageFiles,
    ) -> Features | None:
        """Of a finished chunk the kept ones, else of new images.

        Where one process generates all do, with as many rows, and throw away what they need not: a network that is
        spread over processes has no other way.
        """
        kept = None if chunk is None or not files.has(chunk) else store.read(chunk)
        wants = chunk is not None and kept is None
        if not generator.runtime.gather(np.array([wants])).any():
            return kept
        indices = chunk.indices if chunk is not None else np.empty(0, np.int64)
        at_most = min(self.batch_size, self.protocol.num_images)
        images = generator.images_in_step(indices, condition, at_most)
        if chunk is None or not wants:
            return kept
        features = require_finite(self.extractor(images), self.extractor)
        files.write(chunk, images)
        store.write(chunk, features)
        return features

    def _numbers(self, collected: Mapping[Collects, Any], device: torch.device) -> dict[str, float]:
        """Of all metrics; matrix products on a GPU where there is one, else on the host."""
        numbers: dict[str, float] = {}
        for metric in self.metrics.values():
            numbers |= metric.compute(collected[metric.collects], self.reference, device)
        return numbers

    @property
    def identity(self) -> dict[str, Any]:
        """What two numbers must share to stand in one curve, but for the weights that they are of."""
        return {
            **asdict(self.protocol),
            "feature_extractor_hash": self.extractor.hash,
            "reference_hash": self.reference.hash,
            "metrics": {name: dict(metric.settings) for name, metric in self.metrics.items()},
        }

    def _facts(self, generator: Generator) -> dict[str, Any]:
        """What a number means: extractor, reference, decoder, protocol, settings of the metrics."""
        return {
            "feature_extractor": self.extractor.title,
            **self.extractor.facts,
            "reference": self.reference.name,
            "reference_images": self.reference.statistics.count,
            "frechet_distance_of_real_resample": self.reference.floor,
            "decoder": generator.spec.made_by.weights,
            "network_calls": generator.sampler.calls(),
            "sampling_gmacs": generator.cost() / 1e9,
            **self.identity,
        }


class _Recognition:
    """How many images are recognised as their label, by an extractor that knows the data's classes."""

    def __init__(self) -> None:
        self._counts = np.zeros((1, 2), np.int64)  # recognised, judged

    def add(self, labels: NDArray[np.int64], features: Features) -> None:
        """Labels [B] and features of a batch."""
        if features.classes is not None:
            self._counts += [[(features.classes == labels).sum(), len(labels)]]

    def merged(self, gather: Gather) -> float | None:
        """The fraction over all processes, or None where the extractor knows no classes."""
        recognized, judged = gather(self._counts).sum(axis=0).tolist()
        return recognized / judged if judged else None


def _shared(compute: Callable[[], dict[str, float]], is_main: bool, gather: Gather) -> dict[str, float]:
    """What the main process computes, on all of them."""
    content = json.dumps(compute()).encode() if is_main else b""
    numbers: dict[str, float] = json.loads(gather(np.frombuffer(content, np.uint8)).tobytes())
    return numbers


def distance_records(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of ``evaluations.jsonl`` that hold a distance; others may hold bits per dimension alone."""
    return [line for line in read_lines(folder.evaluations) if "frechet_distance" in line]
