"""Make the training loop's batches from positions in the order of samples."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.batch import Batch
from core.draws import Philox, Times, training_draws
from core.prefetch import DEPTH
from data.conditions import ConditionSource, with_dropped
from data.order import Order, positions_of_step
from data.shards import MappedShards
from model.autoencoder import Autoencoder

CHUNK = 32  # samples that the autoencoder draws at once, so that intermediate values fit the CPU cache


class TrainingBatches:
    """Training batches as a pure function of (seed, step); process ``rank`` of ``world`` reads its slice of each.

    Raises ValueError where the batch size is not a multiple of the world size, or a cache is too small for the order.
    """

    def __init__(
        self,
        shards: MappedShards,
        order: Order,
        autoencoder: Autoencoder,
        conditions: ConditionSource,
        *,
        seed: int,
        batch_size: int,
        times: Times,
        class_dropout: float,
        flip: bool,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        positions_of_step(0, batch_size, rank, world)  # raises where the batch size does not divide
        num_shards = _windows_at_hand(order, batch_size, world) * order.shards_per_window
        shards.require_room(num_shards, can_be_fewer=order.shards_per_window > 1)
        self.shards = shards
        self.order = order
        self.autoencoder = autoencoder
        self.conditions = conditions
        self.seed = seed
        self.batch_size = batch_size
        self.times = times
        self.class_dropout = class_dropout
        self.flip = flip
        self.rank = rank
        self.world = world
        self._philox = Philox(seed)

    def from_step(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the batches of steps first_step .. last_step - 1; a resumed run needs only the step number."""
        for step in range(first_step, last_step):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        """Return this process's batch of one step."""
        spec = self.shards.manifest.spec
        shape = (spec.channels, spec.latent_size, spec.latent_size)
        positions = positions_of_step(step, self.batch_size, self.rank, self.world)
        rows = self.order.rows_at(positions)
        draws = training_draws(self._philox, positions, shape, self.times, self.class_dropout, self.flip)
        moments = self._moments(positions, rows, draws.flip)
        condition = self.conditions.of_samples(self.shards.labels_of(rows))
        return Batch(
            x_0=self._latents(torch.from_numpy(moments), torch.from_numpy(draws.posterior)),
            noise=torch.from_numpy(draws.noise),
            t=torch.from_numpy(draws.t),
            condition=with_dropped(self.conditions, condition, draws.dropped),
        )

    def _moments(
        self, positions: NDArray[np.int64], rows: NDArray[np.int64], flips: NDArray[np.bool_]
    ) -> NDArray[np.float16]:
        """Return moments [B, 2c, h, w] of consecutive positions, window by window; at most two windows are local."""
        moments = np.empty((len(rows), *self.shards.manifest.spec.sample_shape[1:]), dtype=np.float16)
        start = 0
        while start < len(positions):
            window = self.order.window(int(positions[start]))
            stop = min(len(positions), window.last - int(positions[0]))
            self.shards.expect([*window.shards.tolist(), *self.order.window(window.last).shards.tolist()])
            self.shards.gather(rows[start:stop], flips[start:stop], out=moments[start:stop])
            start = stop
        return moments

    def _latents(self, moments: Tensor, posterior: Tensor) -> Tensor:
        """Return scaled latents [B, c, h, w], drawn with moments [B, 2c, h, w] and normals [B, c, h, w]."""
        latents = torch.empty_like(posterior)
        for chunk in range(0, len(latents), CHUNK):
            part = slice(chunk, chunk + CHUNK)
            latents[part] = self.autoencoder.draw(moments[part], posterior[part])
        return latents


def _windows_at_hand(order: Order, batch_size: int, world: int) -> int:
    """Return how many windows the processes of a host, which share a cache, may need at once.

    Each process needs its current window and the next. Processes of one run read different parts of a batch, and drift
    apart by the batches that `prefetch` holds, the one it prepares and the one the device computes on.
    """
    drift = (DEPTH + 2) * batch_size if world > 1 else 0
    return 2 + math.ceil(drift / order.smallest_window)
