"""The global order of samples: a pure function of (seed, position).

``position`` counts samples seen since the start of training. Position p lies in epoch p // N and visits row
``permutation(seed, epoch)[p % N]``: every sample once per epoch, another order each epoch, and nothing that
depends on processes, devices or batches. A batch may straddle two epochs; none is ever short.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from diffusion.draws import Philox, Purpose, permutation


@lru_cache(maxsize=2)  # a batch needs at most two epochs where it is smaller than the data
def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """Rows in the order of one epoch: a permutation of range(num_samples), read-only."""
    order = permutation(Philox(seed), epoch, Purpose.ORDER, num_samples)
    order.flags.writeable = False
    return order


def rows_at(seed: int, positions: NDArray[np.int64], num_samples: int) -> NDArray[np.int64]:
    """Rows that the given positions visit, [len(positions)] int64."""
    rows = np.empty_like(positions)
    epochs = positions // num_samples
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = epoch_order(seed, int(epoch), num_samples)[positions[chosen] % num_samples]
    return rows


def positions_of_step(step: int, batch_size: int, rank: int, world: int) -> NDArray[np.int64]:
    """Positions that one of ``world`` processes reads at ``step``: its slice of the global batch.

    Raises ValueError where the batch does not divide.
    """
    if batch_size % world:
        raise ValueError(
            f"batch_size {batch_size} does not divide by the {world} processes; "
            f"use {batch_size - batch_size % world or world} or {batch_size + world - batch_size % world}."
        )
    share = batch_size // world
    first = step * batch_size + rank * share
    return np.arange(first, first + share, dtype=np.int64)
