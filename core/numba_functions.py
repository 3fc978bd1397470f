"""Compile functions with numba. Import this file only where the compiled functions are wanted."""

from collections.abc import Callable
from typing import Any

from numba import njit

Function = Callable[..., Any]


def compiled(signature: Any) -> Callable[[Function], Function]:
    """Compile a function of this signature at once, or load it from numba's cache.

    ``signature`` is numba's object or a text. The function runs without the GIL, and each operation rounds.
    """

    def decorate(function: Function) -> Function:
        try:
            return njit(signature, nogil=True, cache=True, error_model="numpy")(function)
        except Exception:  # numba has no folder that it can write, the disk is full, or a file of its cache is damaged
            return njit(signature, nogil=True, error_model="numpy")(function)

    return decorate
