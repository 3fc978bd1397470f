"""Draw by the generator ``philox32_v1``: several times faster than numpy's, with bits that any device can draw too.

A stream has the number purpose + 256 x draw, and `core.tensor_philox32` defines its words and normals. All of this is
part of the format of a run.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from core.deferred import Deferred
from core.draws import Purpose, Times, require_seed
from core.normal_table import normal_table
from core.samples import Normals
from core.tensor_philox32 import normals_of_words, stream_words

_PURPOSES, _DRAWS = 2**8, 2**24
_AT_ONCE = 2**15  # numbers that are drawn at once without numba, so that they fit the CPU's cache
_CHECKED = (3, 2**40, 2**62 + 5)  # positions


class Philox32:
    """Random numbers addressed by (position, purpose, draw). Several threads may use one."""

    def __init__(self, seed: int) -> None:
        require_seed(seed)
        self._seed = seed

    def first_words(self, positions: NDArray[np.int64], purpose: Purpose) -> NDArray[np.uint64]:
        """Return the first 64 bits of the stream of each position, [B]."""
        if compiled := FAST_PHILOX32.get(len(positions)):
            words = np.empty(len(positions), np.uint64)
            compiled.fill_first_words(words, positions, np.uint64(_stream(purpose)), np.uint64(self._seed))
            return words
        return _first_words(positions, _stream(purpose), self._seed)

    def fill(self, normals: NDArray[np.float32], positions: NDArray[np.int64], purpose: Purpose, draw: int) -> None:
        """Write the standard normals of each position's stream to its row of ``normals`` [B, n]."""
        stream = _stream(purpose, draw)
        if compiled := FAST_PHILOX32.get(normals.size):
            compiled.normals(stream, self._seed).write(normals, positions)
        else:
            _fill_normals(normals, positions, stream, self._seed)

    def compiled(self, purpose: Purpose, draw: int) -> Normals | None:
        """Return the compiled function by which `fill` draws, or None where PyTorch draws."""
        compiled = FAST_PHILOX32.get(0)
        return compiled and compiled.normals(_stream(purpose, draw), self._seed)

    def times(self, positions: NDArray[np.int64], times: Times) -> NDArray[np.generic]:
        """Return the t of each position, [B]."""
        return times.of_bits(self.first_words(positions, Purpose.TIMESTEP))


class CompiledPhilox32(NamedTuple):
    """The functions of `core.compiled_philox32`."""

    fill_normals: Callable[..., None]
    fill_first_words: Callable[..., None]

    def normals(self, stream: int, seed: int) -> Normals:
        """Return the function that draws the normals of a stream."""
        return Normals(self.fill_normals, np.array([stream, seed], np.uint64), normal_table())


def load_philox32() -> CompiledPhilox32:
    """Return the compiled functions. Raises any exception of numba, or ArithmeticError where PyTorch's bits differ."""
    compiled = import_module("core.compiled_philox32")
    functions = CompiledPhilox32(compiled.fill_normals, compiled.fill_first_words)
    if not _equal_pytorchs(functions):
        raise ArithmeticError("they differ from PyTorch's on this machine")
    return functions


FAST_PHILOX32 = Deferred("draws", load_philox32, worth=2**23)  # normals; PyTorch draws them in 0.4 seconds


def _stream(purpose: Purpose, draw: int = 0) -> int:
    assert 0 <= draw < _DRAWS, f"there are {_DRAWS} draws of a purpose, and {draw} is none of them"
    return purpose + _PURPOSES * draw


def _first_words(positions: NDArray[np.int64], stream: int, seed: int) -> NDArray[np.uint64]:
    words = stream_words(torch.from_numpy(positions), 17, stream, seed).numpy()
    return np.asarray(words[:, 0] | words[:, 16] << 32).view(np.uint64)


def _fill_normals(normals: NDArray[np.float32], positions: NDArray[np.int64], stream: int, seed: int) -> None:
    rows = max(1, _AT_ONCE // max(1, normals.shape[1]))
    for first in range(0, len(positions), rows):
        part = torch.from_numpy(positions[first : first + rows])
        words = stream_words(part, normals.shape[1], stream, seed)
        normals[first : first + rows] = normals_of_words(words).numpy()


def _equal_pytorchs(compiled: CompiledPhilox32) -> bool:
    positions, stream, seed = np.array(_CHECKED), _stream(Purpose.NOISE, 3), 2**40 + 7
    found, expected = np.empty((2, len(positions), 4099), np.float32)
    compiled.normals(stream, seed).write(found, positions)
    _fill_normals(expected, positions, stream, seed)
    words = np.empty(len(positions), np.uint64)
    compiled.fill_first_words(words, positions, np.uint64(stream), np.uint64(seed))
    return np.array_equal(found, expected) and np.array_equal(words, _first_words(positions, stream, seed))
