"""Load the compiled draws, and compare some of them with numpy's."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.deferred import Deferred
from core.ziggurat import Tables, tables

_CHECKED = (16, 4099)  # streams, and normals of each


class CompiledDraws(NamedTuple):
    """The functions of `core.compiled_draws`, and the tables that they take."""

    fill_normals: Callable[..., None]
    fill_first_words: Callable[..., None]
    tables: Tables

    def normals(self, out: NDArray[np.float32], positions: NDArray[np.int64], *stream: np.uint64) -> None:
        """Write normals to each row of ``out`` [B, n] from the ``stream`` (seed, purpose, draw) of its position."""
        spare = out.shape[1] // 64 + 16  # one in 80 normals takes more than 32 bits
        self.fill_normals(out, positions, *stream, spare, *self.tables)


def load_draws() -> CompiledDraws:
    """Return the compiled draws. Raises any exception of numba, or ArithmeticError where they differ from numpy's."""
    compiled = import_module("core.compiled_draws")
    draws = CompiledDraws(compiled.fill_normals, compiled.fill_first_words, tables())
    if not _equal_numpys(draws):
        raise ArithmeticError("they differ from numpy's on this machine")
    return draws


FAST_DRAWS = Deferred("draws", load_draws, worth=2**24)  # normals; numpy draws them in 0.2 seconds


def _equal_numpys(draws: CompiledDraws) -> bool:
    seed, purpose = np.uint64(1), np.uint64(2)
    positions, found = np.arange(_CHECKED[0]), np.empty(_CHECKED, np.float32)
    draws.normals(found, positions, seed, purpose, np.uint64(3))
    words = np.empty(len(positions), np.uint64)
    draws.fill_first_words(words, positions, seed, purpose)
    return all(
        np.array_equal(row, _generator(position, 3).standard_normal(_CHECKED[1], dtype=np.float32))
        and word == _generator(position, 0).bit_generator.random_raw()
        for position, row, word in zip(positions.tolist(), found, words, strict=True)
    )


def _generator(position: int, draw: int) -> np.random.Generator:
    counter = np.array([0, position, 2, draw], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([1, 0], dtype=np.uint64), counter=counter))
