"""Collect what metrics need from the features of a stream of images, and merge it over processes.

A metric names what it needs by a `Collects`; metrics with equal needs share one `Collector`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from evaluation.features.extractor import Features
from evaluation.metrics.statistics import FeatureStatistics, Gather

Part = Literal["vectors", "spatial"]  # of `Features`


class Collector(Protocol):
    """Collects the features of one process's images."""

    def add(self, indices: NDArray[np.int64], features: Features) -> None:
        """Add the features of the images with these indices [B]."""
        ...

    def merged(self, gather: Gather) -> Any:
        """Return what all processes together have collected. Every process must call it."""
        ...


class Collects(Protocol):
    """A kind of collector. Equal ones are shared, so it must be hashable."""

    def start(self, num_images: int) -> Collector:
        """Return an empty collector for ``num_images`` images."""
        ...


@dataclass(frozen=True)
class StatisticsOf:
    """Collects mean and covariance of a part of the features, as the float64 sums of `FeatureStatistics`."""

    part: Part

    def start(self, num_images: int) -> "StatisticsCollector":
        """Return a collector without images."""
        return StatisticsCollector(self.part)


class StatisticsCollector:
    """Collects the sums of x and x x^T."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._statistics: FeatureStatistics | None = None  # its dimension is known from the first batch on

    def add(self, indices: NDArray[np.int64], features: Features) -> None:
        """Add a batch to the sums."""
        found = FeatureStatistics.of(_rows_of(features, self._part))
        self._statistics = found if self._statistics is None else self._statistics + found

    def merged(self, gather: Gather) -> FeatureStatistics:
        """Return the sums over all processes, some of which may have had no image."""
        size = 0 if self._statistics is None else len(self._statistics.total)
        sizes = gather(np.array([size]))
        mine = self._statistics or FeatureStatistics.empty(int(sizes.max()))
        return mine.merged(gather)


@dataclass(frozen=True)
class RowsOf:
    """Collects the vectors themselves, float32 [num_images, D] by image index: 8 KB an image for Inception's."""

    part: Part

    def start(self, num_images: int) -> "RowsCollector":
        """Return a collector without rows."""
        return RowsCollector(self.part)


class RowsCollector:
    """Collects rows and their indices."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._indices: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.float32]] = []

    def add(self, indices: NDArray[np.int64], features: Features) -> None:
        """Keep a batch, without a copy."""
        self._indices.append(indices)
        self._rows.append(_rows_of(features, self._part))

    def merged(self, gather: Gather) -> NDArray[np.float32]:
        """Return the rows of all processes, sorted by index."""
        size = int(gather(np.array([self._rows[0].shape[1] if self._rows else 0])).max())
        rows = gather(np.concatenate([np.empty((0, size), np.float32), *self._rows]))
        indices = gather(np.concatenate([np.empty(0, np.int64), *self._indices]))
        return rows[np.argsort(indices, kind="stable")]


@dataclass(frozen=True)
class SplitSums:
    """The number of images, the sum of sum_c p_c log p_c, and the sum of p of each split, for an Inception Score."""

    counts: NDArray[np.int64]  # [num_splits]
    negative_entropies: NDArray[np.float64]  # [num_splits], in nats
    marginals: NDArray[np.float64]  # [num_splits, num_classes]


@dataclass(frozen=True)
class SplitSumsOf:
    """Collects sums of class probabilities over splits of ``split_size`` images by index; the last may be shorter."""

    split_size: int

    def start(self, num_images: int) -> "SplitSumsCollector":
        """Return a collector without images."""
        return SplitSumsCollector(self.split_size, -(-num_images // self.split_size))


class SplitSumsCollector:
    """Collects the sums of each split in float64."""

    def __init__(self, split_size: int, num_splits: int) -> None:
        self._split_size = split_size
        self._counts = np.zeros(num_splits, np.int64)
        self._negative_entropies = np.zeros(num_splits)
        self._marginals: NDArray[np.float64] | None = None

    def add(self, indices: NDArray[np.int64], features: Features) -> None:
        """Add the softmax of the logits to the sums of each image's split."""
        assert features.logits is not None
        logits = features.logits.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        if self._marginals is None:
            self._marginals = np.zeros((len(self._counts), p.shape[1]))
        splits = indices // self._split_size
        np.add.at(self._counts, splits, 1)
        np.add.at(self._negative_entropies, splits, (p * log_p).sum(axis=1))
        np.add.at(self._marginals, splits, p)

    def merged(self, gather: Gather) -> SplitSums:
        """Return the sums over all processes."""
        size = int(gather(np.array([0 if self._marginals is None else self._marginals.shape[1]])).max())
        marginals = np.zeros((len(self._counts), size)) if self._marginals is None else self._marginals
        return SplitSums(
            gather(self._counts[np.newaxis]).sum(axis=0),
            gather(self._negative_entropies[np.newaxis]).sum(axis=0),
            gather(marginals[np.newaxis]).sum(axis=0),
        )


@dataclass(frozen=True)
class CaptionSums:
    """The number of images, the sum of the similarities to their captions that are positive, and truncated captions."""

    count: int
    positive: float
    truncated: int


@dataclass(frozen=True)
class CaptionSumsOf:
    """Collects sums over the scores of a `CaptionScorer`."""

    def start(self, num_images: int) -> "CaptionSumsCollector":
        """Return a collector without images."""
        return CaptionSumsCollector()


class CaptionSumsCollector:
    """Collects the sums in float64."""

    def __init__(self) -> None:
        self._sums = np.zeros((1, 3))  # count, positive, truncated

    def add(self, indices: NDArray[np.int64], features: Features) -> None:
        """Add a batch to the sums."""
        assert features.captioned is not None
        similarity, truncated = features.captioned.astype(np.float64).T
        self._sums += [[len(indices), similarity.clip(min=0).sum(), truncated.sum()]]

    def merged(self, gather: Gather) -> CaptionSums:
        """Return the sums over all processes."""
        count, positive, truncated = gather(self._sums).sum(axis=0).tolist()
        return CaptionSums(int(count), positive, int(truncated))


def start_all(kinds: Sequence[Collects], num_images: int) -> dict[Collects, Collector]:
    """Return one new collector for each different kind."""
    return {kind: kind.start(num_images) for kind in dict.fromkeys(kinds)}


def _rows_of(features: Features, part: Part) -> NDArray[np.float32]:
    rows = features.vectors if part == "vectors" else features.spatial
    assert rows is not None, f"a metric asked an extractor for {part}, which it does not give"
    return rows
