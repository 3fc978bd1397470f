"""Evaluate a denoiser: generate images, compare them with the reference, and record numbers and protocol."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from core.batch import Condition
from core.precision import exact_device
from core.progress import ProgressBar
from core.records import canonical_hash
from data.conditions import ConditionSource
from evaluation.chunks import Chunk, ChunkStore, chunks_of
from evaluation.features.extractor import CaptionScorer, FeatureExtractor, Features, require_finite
from evaluation.generate import Generator
from evaluation.image_files import ImageFiles, NoFiles
from evaluation.metrics.collectors import Collects, start_all
from evaluation.metrics.frechet import FrechetDistance
from evaluation.metrics.metric import CaptionMetric, Metric
from evaluation.metrics.statistics import Gather
from evaluation.recognition import Recognition
from evaluation.reference.reference import Reference
from train.lines import read_lines
from train.runfolder import RunFolder


@dataclass(frozen=True)
class MeasurementProtocol:
    """The way in which a number is measured. A curve never has numbers of two protocols."""

    sampler: Mapping[str, Any]  # name and arguments
    guidance: Mapping[str, Any]
    num_images: int
    sampling_seed: int  # for the noise and for random labels
    network_precision: str  # fp32, tf32 or bf16; not named `precision`, which is a metric
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
    batch_size: int  # images of a process at once, and of a chunk; does not affect results
    metrics: Mapping[str, Metric] = field(default_factory=lambda: {"frechet": FrechetDistance()})
    captions: Sequence[str] | None = None  # of image i at index i, where images have captions

    def __post_init__(self) -> None:
        assert self.captions is None or len(self.captions) == self.protocol.num_images
        assert self.captions is not None or self.scorer is None, "require_metrics refuses these"

    @property
    def scorer(self) -> CaptionScorer | None:
        """Return what compares images with their captions, if a metric does."""
        found = (metric.scorer for metric in self.metrics.values() if isinstance(metric, CaptionMetric))
        return next(found, None)

    @property
    def features_hash(self) -> str:
        """Return the hash of everything that determines the features of a chunk's images."""
        if (scorer := self.scorer) is None:
            return self.extractor.hash
        return canonical_hash([self.extractor.hash, scorer.hash, list(self.captions or ())], spaced=True)

    def require(self, image_size: int, num_classes: int) -> None:
        """Raise ValueError, before images are generated, where the reference or a metric does not fit."""
        self.reference.require(image_size, None if self.captions is not None else num_classes)
        for metric in self.metrics.values():
            metric.require(self.extractor, self.reference, self.protocol.num_images)

    def evaluate(
        self,
        generator: Generator,
        progress: ProgressBar,
        store: ChunkStore | None = None,
        files: ImageFiles | None = None,
    ) -> dict[str, Any]:
        """Return the metrics of the protocol's images and the protocol: most of a record of evaluations.jsonl.

        Every process must call it; each generates its share and all return the same record. Chunks that ``store``
        and ``files`` already have are not generated again.
        """
        self.require(generator.spec.image_size, generator.spec.num_classes)
        protocol, runtime = self.protocol, generator.runtime
        same = {"feature extractor": self.features_hash, "reference": self.reference.hash, **self.of_captions}
        runtime.require_same(same)
        store, files = store or ChunkStore(), files or NoFiles()
        condition = protocol.condition_of(generator.conditions)
        classes = generator.conditions.classes(condition)
        collectors = start_all([metric.collects for metric in self.metrics.values()], protocol.num_images)
        texts = generator.conditions.texts(condition)
        recognition = Recognition(classes, texts, generator.conditions.held_out)
        files.start(store.plan, runtime.is_main)
        runtime.wait()
        with progress("evaluate", 0, protocol.num_images, "img") as bar:
            for chunk in self._rounds(runtime.data_rank, runtime.data_world):
                features = self._features_of(chunk, generator, condition, store, files)
                if chunk is None or features is None:
                    continue
                for collector in collectors.values():
                    collector.add(chunk.indices, features)
                recognition.add(chunk.indices, features)
                bar.update((chunk.last - chunk.first) * runtime.data_world)
        runtime.wait()  # until the files of all processes are written
        if runtime.is_main:
            files.finish(chunks_of(protocol.num_images, self.batch_size, 0, 1), classes, self.captions)
        collected = {kind: collector.merged(runtime.gather) for kind, collector in collectors.items()}
        numbers = _shared(
            lambda: self._numbers(collected, exact_device(runtime.device)), runtime.is_main, runtime.gather
        )
        facts = self._facts(generator)
        assert not facts.keys() & numbers.keys(), "a number must not take the place of a fact"
        return {**facts, **numbers, **recognition.merged(runtime.gather)}

    def _rounds(self, rank: int, world: int) -> list[Chunk | None]:
        """Return the chunks of a process, then None if other processes have one more."""
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
        """Return the stored features of a finished chunk, else the features of new images.

        If one process generates images, all do, with the same number of rows, and discard those that they do not need:
        a network that is sharded over processes requires it.
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
        features = self._seen(images, indices)
        files.write(chunk, images)
        store.write(chunk, features)
        return features

    def _seen(self, images: NDArray[np.uint8], indices: NDArray[np.int64]) -> Features:
        """Return the features of images [B, H, W, C] with these indices [B], with the scores of their captions."""
        features = require_finite(self.extractor(images), self.extractor)
        if (scorer := self.scorer) is None:
            return features
        assert self.captions is not None
        return features._replace(captioned=scorer(images, [self.captions[index] for index in indices]))

    def _numbers(self, collected: Mapping[Collects, Any], device: torch.device) -> dict[str, float]:
        """Return the numbers of all metrics; ``device`` computes matrix products."""
        numbers: dict[str, float] = {}
        for metric in self.metrics.values():
            numbers |= metric.compute(collected[metric.collects], self.reference, device)
        return numbers

    @property
    def identity(self) -> dict[str, Any]:
        """Return the facts, apart from the weights, that two numbers must share to be in one curve."""
        return {
            **asdict(self.protocol),
            "feature_extractor_hash": self.extractor.hash,
            "reference_hash": self.reference.hash,
            "metrics": {name: dict(metric.settings) for name, metric in self.metrics.items()},
            **self.of_captions,
        }

    @property
    def of_captions(self) -> dict[str, str]:
        """Return the hash of the captions by its key in a record, or nothing without captions."""
        if self.captions is None:
            return {}
        return {"captions_hash": canonical_hash(list(self.captions), spaced=True)}

    def _facts(self, generator: Generator) -> dict[str, Any]:
        """Return the facts that define a number: extractor, reference, decoder, protocol, settings of the metrics."""
        return {
            "feature_extractor": self.extractor.title,
            **({} if self.scorer is None else {"caption_scorer": self.scorer.title}),
            **self.extractor.facts,
            "reference": self.reference.name,
            "reference_images": self.reference.statistics.count,
            "frechet_distance_of_real_resample": self.reference.floor,
            "decoder": generator.spec.made_by.weights,
            "network_calls": generator.sampler.calls(),
            "sampling_gmacs": None if (cost := generator.cost()) is None else cost / 1e9,
            **self.identity,
        }


def _shared(compute: Callable[[], dict[str, float]], is_main: bool, gather: Gather) -> dict[str, float]:
    """Return, on all processes, the numbers that the main process computes."""
    content = json.dumps(compute()).encode() if is_main else b""
    numbers: dict[str, float] = json.loads(gather(np.frombuffer(content, np.uint8)).tobytes())
    return numbers


def distance_records(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the lines of ``evaluations.jsonl`` that have a distance; others may have bits per dimension alone."""
    return [line for line in read_lines(folder.evaluations) if "frechet_distance" in line]
