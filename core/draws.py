"""Draw every random number on the host, as a pure function of (seed, position, purpose).

Each purpose has a stream of its own, so no use of randomness shifts another; nothing has a state to save. The bits of
`Philox` come from numpy's Philox 4x64 with key (seed, 0) and counter (0, position, purpose, draw). Where many are
drawn, compiled functions draw the same bits faster (`core.fast_draws`). A run may draw what its training needs by
another class of `Streams`, `core.philox32.Philox32`; everything else is drawn by `Philox`.
"""

import math
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from core.fast_draws import FAST_DRAWS
from core.samples import Normals


class Purpose(IntEnum):
    """The use of a stream of random numbers. The values are part of the format of a run: never change or reuse one."""

    POSTERIOR = 1
    NOISE = 2
    TIMESTEP = 3
    DROP_LABEL = 4
    FLIP = 5
    ORDER = 6
    SAMPLING = 7
    ENCODING_ORDER = 9
    SPLIT = 10
    LIKELIHOOD = 11
    WINDOWED_ORDER = 12
    SAMPLE_LABEL = 13
    SUBSET = 14
    REFERENCE = 15
    PROBE = 16
    CAPTION = 17


class Draws(NamedTuple):
    """All random numbers of one visit of each of B samples."""

    posterior: NDArray[np.float32]  # [B, c, h, w] standard normal
    noise: NDArray[np.float32]  # [B, c, h, w] standard normal
    t: NDArray[np.generic]  # [B] of the objective's dtype
    dropped: NDArray[np.bool_]  # [B], where the condition is replaced by the null condition
    flip: NDArray[np.bool_]  # [B]


class Choices(NamedTuple):
    """The draws without the normals."""

    t: NDArray[np.generic]  # [B] of the objective's dtype
    dropped: NDArray[np.bool_]  # [B], where the condition is replaced by the null condition
    flip: NDArray[np.bool_]  # [B]


class Times(Protocol):
    """Draws the t of one sample."""

    dtype: np.dtype[Any]  # of a batch's t

    def draw(self, generator: np.random.Generator) -> float:
        """Return one t. The generator is at the start of the stream of the sample's position."""
        ...

    def of_bits(self, words: NDArray[np.uint64]) -> NDArray[np.generic]:
        """Return the t of many samples, each from 64 random bits; they may differ from those that `draw` gives."""
        ...


@runtime_checkable
class TimesOfWords(Times, Protocol):
    """Draws the t of many samples at once: the same as `draw` gives."""

    def of_words(self, words: NDArray[np.uint64]) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
        """Return t of the first 64 bits of each sample's stream, and where more bits decide, so that `draw` must."""
        ...


class Streams(Protocol):
    """Draws the random numbers of training, from one stream for each (seed, position, purpose, draw)."""

    def first_words(self, positions: NDArray[np.int64], purpose: Purpose) -> NDArray[np.uint64]:
        """Return the first 64 bits of the stream of each position, [B]."""
        ...

    def fill(self, normals: NDArray[np.float32], positions: NDArray[np.int64], purpose: Purpose, draw: int) -> None:
        """Write the standard normals of each position's stream to its row of ``normals`` [B, n]."""
        ...

    def compiled(self, purpose: Purpose, draw: int) -> Normals | None:
        """Return the compiled function by which `fill` draws, or None where another one draws."""
        ...

    def times(self, positions: NDArray[np.int64], times: Times) -> NDArray[np.generic]:
        """Return the t of each position, [B] of the dtype of ``times``."""
        ...


def require_seed(seed: int) -> None:
    """Raise ValueError for a seed that no generator accepts."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, but it must be between 0 and {2**63 - 1}; choose another.")


class Philox:
    """Random generators addressed by (position, purpose, draw). Not safe to share between threads."""

    def __init__(self, seed: int) -> None:
        require_seed(seed)
        self._bits = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state  # of a fresh generator: nothing is buffered
        self._counter = self._state["state"]["counter"]
        self._seed = seed

    def at(self, position: int, purpose: Purpose, draw: int = 0) -> np.random.Generator:
        """Return the generator of one stream, at its start. It is valid until the next call of `at`."""
        self._counter[1], self._counter[2], self._counter[3] = position, purpose, draw
        # Setting a state is several times cheaper than a new generator, which asks the system for entropy.
        self._bits.state = self._state
        return self._generator

    def first_words(self, positions: NDArray[np.int64], purpose: Purpose) -> NDArray[np.uint64]:
        """Return the first 64 bits of the stream of each position, [B]."""
        words = np.empty(len(positions), np.uint64)
        if compiled := FAST_DRAWS.get(len(positions)):
            compiled.fill_first_words(words, positions, np.uint64(self._seed), np.uint64(purpose))
        else:
            for i, position in enumerate(positions.tolist()):
                words[i] = self.at(position, purpose).bit_generator.random_raw()
        return words

    def fill(self, normals: NDArray[np.float32], positions: NDArray[np.int64], purpose: Purpose, draw: int) -> None:
        """Write the standard normals of each position's stream to its row of ``normals`` [B, n]."""
        if compiled := FAST_DRAWS.get(normals.size):
            compiled.normals(self._seed, purpose, draw).write(normals, positions)
        else:
            for row, position in zip(normals, positions.tolist(), strict=True):
                self.at(position, purpose, draw).standard_normal(dtype=np.float32, out=row)

    def compiled(self, purpose: Purpose, draw: int) -> Normals | None:
        """Return the compiled function by which `fill` draws, or None where numpy draws."""
        compiled = FAST_DRAWS.get(0)
        return compiled and compiled.normals(self._seed, purpose, draw)

    def times(self, positions: NDArray[np.int64], times: Times) -> NDArray[np.generic]:
        """Return the t of each position, [B] of the dtype of ``times``."""
        t = np.empty(len(positions), dtype=times.dtype)
        remaining = np.ones(len(positions), dtype=bool)
        if isinstance(times, TimesOfWords):
            t[:], remaining = times.of_words(self.first_words(positions, Purpose.TIMESTEP))
        for i in np.flatnonzero(remaining):
            t[i] = times.draw(self.at(int(positions[i]), Purpose.TIMESTEP))
        return t


def training_draws(
    streams: Streams,
    positions: NDArray[np.int64],
    shape: tuple[int, ...],
    times: Times,
    class_dropout: float,
    flip: bool,
) -> Draws:
    """Return the draws of the samples at ``positions`` [B], which count samples since the start of training.

    ``shape`` is the latent's [c, h, w]; ``flip`` says whether the data may be mirrored at all.
    """
    posterior, noise = (
        draw_noise(streams, positions, 0, shape, purpose) for purpose in (Purpose.POSTERIOR, Purpose.NOISE)
    )
    return Draws(posterior, noise, *draw_choices(streams, positions, times, class_dropout, flip))


def draw_choices(
    streams: Streams, positions: NDArray[np.int64], times: Times, class_dropout: float, flip: bool
) -> Choices:
    """Return t, dropped and flip of the samples at ``positions`` [B], as `training_draws` does."""
    flipped = np.zeros(len(positions), dtype=bool)
    if flip:
        flipped = draw_uniform(streams, positions, Purpose.FLIP) < 0.5
    return Choices(
        t=streams.times(positions, times),
        dropped=draw_uniform(streams, positions, Purpose.DROP_LABEL) < class_dropout,
        flip=flipped,
    )


def draw_uniform(streams: Streams, positions: NDArray[np.int64], purpose: Purpose) -> NDArray[np.float64]:
    """Return a number in [0, 1) of each position's stream, [B]."""
    return _uniform(streams.first_words(positions, purpose))


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return what numpy's ``random()`` makes of 64 bits, in [0, 1)."""
    return np.multiply(words >> np.uint64(11), 2.0**-53, dtype=np.float64)


def draw_noise(
    streams: Streams, positions: NDArray[np.int64], draw: int, shape: tuple[int, ...], purpose: Purpose
) -> NDArray[np.float32]:
    """Return standard normals [B, *shape]: the draw'th of each position, independent of the batch."""
    noise = np.empty((len(positions), math.prod(shape)), dtype=np.float32)
    streams.fill(noise, positions, purpose, draw)
    return noise.reshape(len(positions), *shape)


def permutation(philox: Philox, position: int, purpose: Purpose, length: int, draw: int = 0) -> NDArray[np.int64]:
    """Return a permutation of range(length): the stable sort of raw 64-bit numbers, the same in any numpy."""
    keys = philox.at(position, purpose, draw).bit_generator.random_raw(length)
    return np.argsort(keys, kind="stable")
