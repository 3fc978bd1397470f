"""Load the compiled draws, and compare some of them with numpy's."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.deferred import Deferred
from core.samples import Normals
from core.ziggurat import tables

_CHECKED = (16, 4099)  # streams, and normals of each


class CompiledDraws(NamedTuple):
    """The functions of `core.compiled_draws`, and the tables that they take."""

    fill_normals: Callable[..., None]
    fill_first_words: Callable[..., None]
    table: NDArray[np.uint32]

    def normals(self, seed: int, purpose: int, draw: int) -> Normals:
        """Return the function that draws the normals of these streams."""
        return Normals(self.fill_normals, np.array([seed, purpose, draw], np.uint64), self.table)


def load_draws() -> CompiledDraws:
    """Return the compiled draws. Raises any exception of numba, or ArithmeticError where they differ from numpy's."""
    compiled = import_module("core.compiled_draws")
    draws = CompiledDraws(compiled.fill_normals, compiled.fill_first_words, tables().bits())
    if not _equal_numpys(draws):
        raise ArithmeticError("they differ from numpy's on this machine")
    return draws


FAST_DRAWS = Deferred("draws", load_draws, worth=2**24)  # normals; numpy draws them in 0.2 seconds


def _equal_numpys(draws: CompiledDraws) -> bool:
    positions, found = np.arange(_CHECKED[0]), np.empty(_CHECKED, np.float32)
    draws.normals(1, 2, 3).write(found, positions)
    words = np.empty(len(positions), np.uint64)
    draws.fill_first_words(words, positions, np.uint64(1), np.uint64(2))
    return all(
        np.array_equal(row, _generator(position, 3).standard_normal(_CHECKED[1], dtype=np.float32))
        and word == _generator(position, 0).bit_generator.random_raw()
        for position, row, word in zip(positions.tolist(), found, words, strict=True)
    )


def _generator(position: int, draw: int) -> np.random.Generator:
    counter = np.array([0, position, 2, draw], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([1, 0], dtype=np.uint64), counter=counter))
