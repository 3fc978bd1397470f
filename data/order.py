"""Define the order of training samples: a pure function of (seed, position), one class for each kind of `Order`.

``position`` counts samples seen since the start of training; an epoch is num_samples positions. Every order visits
each sample once per epoch, in a different order each time, independent of processes, devices and batches. A batch may
span windows and epochs; every batch is full.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from core.batch import require_divisible
from core.draws import Philox, Purpose, permutation


class Window(NamedTuple):
    """The positions first .. last - 1, which visit rows of ``shards`` only."""

    first: int
    last: int
    shards: NDArray[np.int64]


class Order(Protocol):
    """A map from positions to rows, and to the shards that must be local for them.

    Windows divide the positions into consecutive runs. ``shards_per_window`` is the largest number of shards of any
    window, and ``smallest_window`` the smallest number of positions.
    """

    shards_per_window: int
    smallest_window: int

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows that the given positions visit, [len(positions)] int64."""
        ...

    def window(self, position: int) -> Window:
        """Return the window that the position lies in."""
        ...


class GlobalOrder:
    """An order that permutes all rows in each epoch: the best mixing, for shards on a fast local disk.

    Position p lies in epoch p // num_samples and visits row permutation(seed, epoch)[p % num_samples]. The window is
    the epoch.
    """

    def __init__(self, seed: int, shard_counts: Sequence[int]) -> None:
        self._shards = np.flatnonzero(shard_counts)  # a shard is empty where none of its images could be read
        self.shards_per_window = len(self._shards)
        self.smallest_window = sum(shard_counts)
        self._seed = seed
        self._num_samples = sum(shard_counts)
        self._epoch_rows = lru_cache(maxsize=2)(self._permuted_rows)  # most batches lie in one epoch, some in two

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows that the given positions visit, [len(positions)] int64."""
        epochs = positions // self._num_samples
        if len(epochs) and (first := int(epochs[0])) == int(epochs[-1]) and (epochs == first).all():
            found: NDArray[np.int64] = self._epoch_rows(first)[positions - first * self._num_samples]
            return found
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._epoch_rows(int(epoch))[positions[chosen] % self._num_samples]
        return rows

    def window(self, position: int) -> Window:
        """Return the whole epoch of the position."""
        first = position - position % self._num_samples
        return Window(first, first + self._num_samples, self._shards)

    def _permuted_rows(self, epoch: int) -> NDArray[np.int64]:
        return permutation(Philox(self._seed), epoch, Purpose.ORDER, self._num_samples)


class WindowedOrder:
    """An order that permutes the shards in each epoch, divides them into windows, and permutes the rows of each window.

    It suits remote shards and slow disks: only the current window and the next one must be local. Samples mix within
    ``shards_per_window`` shards, a different set in every epoch. Raises ValueError where ``shards_per_window`` is
    below 1.
    """

    def __init__(self, seed: int, shard_counts: Sequence[int], shards_per_window: int) -> None:
        if shards_per_window < 1:
            raise ValueError(
                f"data.order.shards_per_window is {shards_per_window}, but a window has at least 1 shard; set it to 8."
            )
        self._seed = seed
        self._counts = np.asarray(shard_counts, dtype=np.int64)
        self._shards = np.flatnonzero(self._counts)
        self.shards_per_window = min(shards_per_window, len(self._shards))
        self._first_rows = np.cumsum(self._counts) - self._counts
        self._num_samples = int(self._counts.sum())
        fewest_shards = len(self._shards) % self.shards_per_window or self.shards_per_window  # of an epoch's last
        self.smallest_window = int(np.sort(self._counts[self._shards])[:fewest_shards].sum())
        self._epoch_windows = lru_cache(maxsize=2)(self._cut_windows)
        self._window_rows = lru_cache(maxsize=2)(self._permuted_rows)

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows that the given positions visit, [len(positions)] int64."""
        rows = np.empty_like(positions)
        missing = np.ones(len(positions), dtype=bool)
        while missing.any():
            window = self.window(int(positions[missing][0]))
            inside = (positions >= window.first) & (positions < window.last)
            rows[inside] = self._window_rows(window.first)[positions[inside] - window.first]
            missing &= ~inside
        return rows

    def window(self, position: int) -> Window:
        """Return the window that the position lies in."""
        windows = self._epoch_windows(position // self._num_samples)
        return windows[bisect_right(windows, position, key=lambda window: window.first) - 1]

    def _cut_windows(self, epoch: int) -> list[Window]:
        """Return the windows of one epoch."""
        shards = self._shards[permutation(Philox(self._seed), epoch, Purpose.WINDOWED_ORDER, len(self._shards))]
        windows, first = [], epoch * self._num_samples
        for start in range(0, len(shards), self.shards_per_window):
            chosen = shards[start : start + self.shards_per_window]
            last = first + int(self._counts[chosen].sum())
            windows.append(Window(first, last, chosen))
            first = last
        return windows

    def _permuted_rows(self, first: int) -> NDArray[np.int64]:
        """Return the rows of the window that starts at position ``first``, in order."""
        shards = self.window(first).shards
        rows = np.concatenate([np.arange(self._counts[shard]) + self._first_rows[shard] for shard in shards])
        return rows[permutation(Philox(self._seed), first, Purpose.WINDOWED_ORDER, len(rows), draw=1)]


def positions_of_step(step: int, batch_size: int, rank: int, world: int) -> NDArray[np.int64]:
    """Return the positions that process ``rank`` of ``world`` reads at ``step``: its slice of the global batch.

    Raises ValueError where the batch size is not a multiple of the world size.
    """
    require_divisible(batch_size, world, "processes")
    share = batch_size // world
    first = step * batch_size + rank * share
    return np.arange(first, first + share, dtype=np.int64)
