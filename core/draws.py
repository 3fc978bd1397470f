"""Draw every random number on the host, as a pure function of (seed, position, purpose).

Bits come from numpy's Philox 4x64 with key (seed, 0) and counter (0, position, purpose, draw). Each purpose
has a stream of its own, so no use of randomness shifts another; nothing has a state to save.
"""

from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


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


class Draws(NamedTuple):
    """All random numbers of one visit of each of B samples."""

    posterior: NDArray[np.float32]  # [B, c, h, w] standard normal
    noise: NDArray[np.float32]  # [B, c, h, w] standard normal
    t: NDArray[np.generic]  # [B] of the objective's dtype
    dropped: NDArray[np.bool_]  # [B], where the condition is replaced by the null condition
    flip: NDArray[np.bool_]  # [B]


class Times(Protocol):
    """Draws the t of one sample."""

    dtype: np.dtype[Any]  # of a batch's t

    def draw(self, generator: np.random.Generator) -> float:
        """Return one t. The generator is at the start of the stream of the sample's position."""
        ...


class Philox:
    """Random generators addressed by (position, purpose, draw). Not safe to share between threads."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}, but it must be between 0 and {2**63 - 1}; choose another.")
        self._bits = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state  # of a fresh generator: nothing is buffered
        self._counter = self._state["state"]["counter"]

    def at(self, position: int, purpose: Purpose, draw: int = 0) -> np.random.Generator:
        """Return the generator of one stream, at its start. It is valid until the next call of `at`."""
        self._counter[1], self._counter[2], self._counter[3] = position, purpose, draw
        # Setting a state is several times cheaper than a new generator, which asks the system for entropy.
        self._bits.state = self._state
        return self._generator


def training_draws(
    philox: Philox,
    positions: NDArray[np.int64],
    shape: tuple[int, ...],
    times: Times,
    class_dropout: float,
    flip: bool,
) -> Draws:
    """Return the draws of the samples at ``positions`` [B], which count samples since the start of training.

    ``shape`` is the latent's [c, h, w]; ``flip`` says whether the data may be mirrored at all.
    """
    t = np.empty(len(positions), dtype=times.dtype)
    uniform = np.empty((2, len(positions)))
    for i, position in enumerate(positions.tolist()):
        t[i] = times.draw(philox.at(position, Purpose.TIMESTEP))
        uniform[0, i] = philox.at(position, Purpose.DROP_LABEL).random()
        if flip:
            uniform[1, i] = philox.at(position, Purpose.FLIP).random()
    return Draws(
        posterior=draw_noise(philox, positions, 0, shape, Purpose.POSTERIOR),
        noise=draw_noise(philox, positions, 0, shape, Purpose.NOISE),
        t=t,
        dropped=uniform[0] < class_dropout,
        flip=uniform[1] < 0.5 if flip else np.zeros(len(positions), dtype=bool),
    )


def draw_noise(
    philox: Philox, positions: NDArray[np.int64], draw: int, shape: tuple[int, ...], purpose: Purpose
) -> NDArray[np.float32]:
    """Return standard normals [B, *shape]: the draw'th of each position, independent of the batch."""
    noise = np.empty((len(positions), *shape), dtype=np.float32)
    for row, position in zip(noise, positions.tolist(), strict=True):
        philox.at(position, purpose, draw).standard_normal(dtype=np.float32, out=row)
    return noise


def permutation(philox: Philox, position: int, purpose: Purpose, length: int, draw: int = 0) -> NDArray[np.int64]:
    """Return a permutation of range(length): the stable sort of raw 64-bit numbers, the same in any numpy."""
    keys = philox.at(position, purpose, draw).bit_generator.random_raw(length)
    return np.argsort(keys, kind="stable")
