"""Make the training loop's batches from positions in the order of samples."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.batch import FEATURES, WEIGHT, Batch, Condition
from core.buffers import Buffers
from core.draws import Philox, Purpose, Streams, Times, draw_choices
from core.prefetch import DEPTH
from core.samples import Reads, SampleFiller, sample_filler
from core.threads import ONE_THREAD, Threads
from data.conditions import ConditionSource, Samples, with_dropped
from data.order import Order, positions_of_step
from data.shards import MappedShards, Places
from model.autoencoder import Autoencoder

AHEAD = 4096  # samples of coming batches that are chosen at once: for a few, numpy and PyTorch take as long
CHUNK = 32  # samples that are read and drawn at once, so that intermediate values fit the CPU's cache


class TrainingBatches:
    """Training batches as a pure function of (seed, step); process ``rank`` of ``world`` reads its slice of each.

    ``streams`` makes the streams of random numbers from the seed. ``threads`` threads make a batch; their number
    changes no bit of it. In the first ``target_steps`` steps, batches have a teacher's features with weight 1; later
    ones have zeros with weight 0, of the same shape, and nothing is read for them. Without ``target_steps``, batches
    have no targets.

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
        threads: int = 1,
        target_steps: float | None = None,
        streams: Callable[[int], Streams] = Philox,
    ) -> None:
        positions_of_step(0, batch_size, rank, world)  # raises where the batch size does not divide
        num_shards = _windows_at_hand(order, batch_size, world) * order.shards_per_window
        conditions.announce(shards)
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
        self.target_steps = target_steps
        self._new_streams = streams
        self._streams = streams(seed)
        self._threads = Threads(threads)
        self._buffers = Buffers()
        self._filler: SampleFiller | None = None

    def from_step(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the batches of steps first_step .. last_step - 1; a resumed run needs only the step number."""
        first, ahead = first_step, 1  # training waits for the first batch
        while first < last_step:
            steps = range(first, min(first + ahead, last_step))
            for step, visits in zip(steps, self._visits(steps), strict=True):
                yield self._batch(step, visits)
            first, ahead = steps.stop, max(1, AHEAD * self.world // self.batch_size)

    def batch(self, step: int) -> Batch:
        """Return this process's batch of one step."""
        (visits,) = self._visits(range(step, step + 1))
        return self._batch(step, visits)

    def _visits(self, steps: range) -> "list[_Visits]":
        """Return the samples of some steps, all but their latents, noise and features."""
        positions = np.concatenate([positions_of_step(step, self.batch_size, self.rank, self.world) for step in steps])
        rows = self.order.rows_at(positions)
        t, dropped, flips = draw_choices(self._streams, positions, self.times, self.class_dropout, self.flip)
        condition = self.conditions.of_samples(Samples(self.shards, rows, positions, self._streams))
        visits = _Visits(
            positions,
            rows,
            flips,
            self.shards.places(rows, flips),
            torch.from_numpy(t),
            with_dropped(self.conditions, condition, dropped),
        )
        share = len(positions) // len(steps)
        return [visits.of(slice(first, first + share)) for first in range(0, len(positions), share)]

    def _batch(self, step: int, visits: "_Visits") -> Batch:
        spec, count = self.shards.manifest.spec, len(visits.rows)
        shape = (count, spec.channels, spec.latent_size, spec.latent_size)
        with_features = self.target_steps is not None and step < self.target_steps
        part = _Part(
            *visits[:4],
            self._buffers.empty(shape, np.float32),
            self._buffers.empty(shape, np.float32),
            self._empty_features(count) if with_features else None,
        )
        condition = self._fill(part, visits.condition)
        return Batch(
            x_0=torch.from_numpy(part.latents),
            noise=torch.from_numpy(part.noise),
            t=visits.t,
            condition=condition,
            targets={} if self.target_steps is None else self._targets(part),
        )

    def _empty_features(self, num_rows: int) -> NDArray[np.float16]:
        """Return an array for the features of a batch, [B, T, D], whose values are undefined."""
        teacher = self.shards.manifest.teacher
        assert teacher is not None, "these shards have no features"
        return self._buffers.empty((num_rows, teacher.tokens, teacher.dim), np.float16)

    def _targets(self, part: "_Part") -> dict[str, Tensor]:
        features = part.features
        if features is None:
            features = self._empty_features(len(part.rows))
            features.fill(0)
        weight = torch.full((len(part.rows),), 0.0 if part.features is None else 1.0)
        return {FEATURES: torch.from_numpy(features), WEIGHT: weight}

    def _fill(self, batch: "_Part", condition: Condition) -> Condition:
        """Fill latents and noise of consecutive positions, window by window; at most two windows are local.

        Return the whole condition, for which each window's shards are read too.
        """
        start, conditions = 0, list[Condition]()
        while start < len(batch.positions):
            window = self.order.window(int(batch.positions[start]))
            stop = min(len(batch.positions), window.last - int(batch.positions[0]))
            windows = (window, self.order.window(window.last))
            self.shards.expect(shard for window in windows for shard in window.shards.tolist())
            part, rows = batch, condition
            if stop - start < len(batch.positions):
                part, rows = batch.rows_of(slice(start, stop)), _some_of(condition, slice(start, stop))
            self._fill_window(part)
            conditions.append(self.conditions.whole(rows, self.shards, torch.from_numpy(part.latents)))
            start = stop
        if len(conditions) == 1:
            return conditions[0]
        return {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}

    def _fill_window(self, part: "_Part") -> None:
        can_share, reads = self.shards.map_places(part.places)
        threads = self._threads if can_share else ONE_THREAD
        features = None if part.features is None else self.shards.feature_places(part.rows, part.flips)
        filler = self._compiled_filler()

        def fill(share: slice) -> None:
            done = share.start
            if filler is not None and reads is not None:
                done = self._fill_at_once(part, filler, reads, features, share)
            if done < share.stop:
                self._fill_chunks(part, features, slice(done, share.stop))

        threads.over_rows(len(part.rows), fill)

    def _compiled_filler(self) -> SampleFiller | None:
        """Return the compiled parts of samples, once all of them are at hand."""
        if self._filler is None:
            self._filler = sample_filler(
                self._streams.compiled(Purpose.POSTERIOR, 0),
                self.autoencoder.compiled_draw(),
                self._streams.compiled(Purpose.NOISE, 0),
            )
        return self._filler

    def _fill_at_once(
        self, part: "_Part", filler: SampleFiller, reads: Reads, features: Places | None, share: slice
    ) -> int:
        """Fill a thread's share by one compiled call; return the first row that is not filled, where a file was cut."""
        done = filler.fill(reads, part.positions, part.latents, part.noise, self._chunk(share), share)
        if features is not None and part.features is not None:
            self.shards.read(features.of(slice(share.start, done)), part.features[share.start : done])
        return done

    def _fill_chunks(self, part: "_Part", features: Places | None, share: slice) -> None:
        streams, chunk = self._new_streams(self.seed), self._chunk(share)  # threads do not share one
        for first in range(share.start, share.stop, CHUNK):
            here = slice(first, min(first + CHUNK, share.stop))
            positions, latents, noise = part.positions[here], part.latents[here], part.noise[here]
            moments = self.shards.read(part.places.of(here), chunk[: len(positions)])
            if features is not None and part.features is not None:
                self.shards.read(features.of(here), part.features[here])
            streams.fill(latents.reshape(len(latents), -1), positions, Purpose.POSTERIOR, 0)
            posterior = torch.from_numpy(latents)
            self.autoencoder.draw(torch.from_numpy(moments), posterior, out=posterior)
            streams.fill(noise.reshape(len(noise), -1), positions, Purpose.NOISE, 0)

    def _chunk(self, share: slice) -> NDArray[np.float16]:
        """Return memory for the moments of a chunk, [samples, 2c, h, w]."""
        shape = self.shards.manifest.spec.sample_shape[1:]
        return self._buffers.empty((min(CHUNK, share.stop - share.start), *shape), np.float16)


class _Visits(NamedTuple):
    """Samples of one or more batches, without what has the size of an image."""

    positions: NDArray[np.int64]  # [B], those of a batch are consecutive
    rows: NDArray[np.int64]  # [B]
    flips: NDArray[np.bool_]  # [B]
    places: Places  # [B], of the moments
    t: Tensor  # [B]
    condition: Condition  # without the parts that are added batch by batch

    def of(self, part: slice) -> "_Visits":
        """Return some of the samples."""
        positions, rows, flips, places, t, condition = self
        some = _some_of(condition, part)
        return _Visits(positions[part], rows[part], flips[part], places.of(part), t[part], some)


class _Part(NamedTuple):
    """Samples of a batch at consecutive positions, with the arrays that receive their latents and their noise."""

    positions: NDArray[np.int64]  # [B]
    rows: NDArray[np.int64]  # [B]
    flips: NDArray[np.bool_]  # [B]
    places: Places  # [B], of the moments
    latents: NDArray[np.float32]  # [B, c, h, w]
    noise: NDArray[np.float32]  # [B, c, h, w]
    features: NDArray[np.float16] | None  # [B, T, D]

    def rows_of(self, part: slice) -> "_Part":
        """Return some of the samples."""
        positions, rows, flips, places, latents, noise, features = self
        some = None if features is None else features[part]
        return _Part(positions[part], rows[part], flips[part], places.of(part), latents[part], noise[part], some)


def _some_of(condition: Condition, part: slice) -> Condition:
    return {name: value[part] for name, value in condition.items()}


def _windows_at_hand(order: Order, batch_size: int, world: int) -> int:
    """Return how many windows the processes of a host, which share a cache, may need at once.

    Each process needs its current window and the next. Processes of one run read different parts of a batch, and drift
    apart by the batches that `prefetch` holds, the one it prepares and the one the device computes on.
    """
    drift = (DEPTH + 2) * batch_size if world > 1 else 0
    return 2 + math.ceil(drift / order.smallest_window)
