"""The order of samples: a pure function of (seed, position), by one of the classes behind `Order`.

``position`` counts samples seen since the start of training; N positions are an epoch. Every order visits each
sample once per epoch, differently in each, and depends on no process, device or batch. A batch may straddle
windows and epochs; none is ever short.
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
    """The positions first .. last - 1, which visit rows of ``shards`` and of no others."""

    first: int
    last: int
    shards: NDArray[np.int64]


class Order(Protocol):
    """Which row each position visits, and which shards must be at hand for it.

    Windows cut the positions into consecutive runs. ``shards_per_window`` is the most shards, and
    ``smallest_window`` the fewest positions, of any of them.
    """

    shards_per_window: int
    smallest_window: int

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows that the given positions visit, [len(positions)] int64."""
        ...

    def window(self, position: int) -> Window:
        """The window that the position lies in."""
        ...


class GlobalOrder:
    """An epoch is a permutation of all rows: the best mixing, for shards that are local and fast.

    Position p lies in epoch p // N and visits row permutation(seed, epoch)[p % N]. The window is the epoch.
    """

    def __init__(self, seed: int, shard_counts: Sequence[int]) -> None:
        self._shards = np.flatnonzero(shard_counts)  # a shard is empty where none of its images could be read
        self.shards_per_window = len(self._shards)
        self.smallest_window = sum(shard_counts)
        self._seed = seed
        self._num_samples = sum(shard_counts)
        self._epoch_rows = lru_cache(maxsize=2)(self._permuted_rows)  # most batches lie in one epoch, some in two

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """As `Order` says."""
        rows = np.empty_like(positions)
        epochs = positions // self._num_samples
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._epoch_rows(int(epoch))[positions[chosen] % self._num_samples]
        return rows

    def window(self, position: int) -> Window:
        """The whole epoch."""
        first = position - position % self._num_samples
        return Window(first, first + self._num_samples, self._shards)

    def _permuted_rows(self, epoch: int) -> NDArray[np.int64]:
        return permutation(Philox(self._seed), epoch, Purpose.ORDER, self._num_samples)


class WindowedOrder:
    """An epoch is a permutation of the shards, cut into windows; within a window its rows are permuted.

    For shards that are fetched from afar or lie on a slow disk: only the window that is read and the next one
    need be at hand. Samples mix within ``shards_per_window`` shards, which are others in every epoch.
    Raises ValueError for a window of no shards.
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
        """As `Order` says."""
        rows = np.empty_like(positions)
        missing = np.ones(len(positions), dtype=bool)
        while missing.any():
            window = self.window(int(positions[missing][0]))
            inside = (positions >= window.first) & (positions < window.last)
            rows[inside] = self._window_rows(window.first)[positions[inside] - window.first]
            missing &= ~inside
        return rows

    def window(self, position: int) -> Window:
        """As `Order` says."""
        windows = self._epoch_windows(position // self._num_samples)
        return windows[bisect_right(windows, position, key=lambda window: window.first) - 1]

    def _cut_windows(self, epoch: int) -> list[Window]:
        """The windows of one epoch."""
        shards = self._shards[permutation(Philox(self._seed), epoch, Purpose.WINDOWED_ORDER, len(self._shards))]
        windows, first = [], epoch * self._num_samples
        for start in range(0, len(shards), self.shards_per_window):
            chosen = shards[start : start + self.shards_per_window]
            last = first + int(self._counts[chosen].sum())
            windows.append(Window(first, last, chosen))
            first = last
        return windows

    def _permuted_rows(self, first: int) -> NDArray[np.int64]:
        """Rows in the order of the window that starts at position ``first``."""
        shards = self.window(first).shards
        rows = np.concatenate([np.arange(self._counts[shard]) + self._first_rows[shard] for shard in shards])
        return rows[permutation(Philox(self._seed), first, Purpose.WINDOWED_ORDER, len(rows), draw=1)]


def positions_of_step(step: int, batch_size: int, rank: int, world: int) -> NDArray[np.int64]:
    """Positions that one of ``world`` processes reads at ``step``: its slice of the global batch.

    Raises ValueError where the batch does not divide.
    """
    require_divisible(batch_size, world, "processes")
    share = batch_size // world
    first = step * batch_size + rank * share
    return np.arange(first, first + share, dtype=np.int64)
