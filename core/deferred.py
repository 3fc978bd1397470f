"""Load compiled functions where they pay: to import numba takes longer than a short job computes without it."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Loaded = TypeVar("Loaded")


class Deferred(Generic[Loaded]):
    """Functions that give the same numbers faster, once this process has computed ``worth`` numbers without them.

    ``load`` imports them, compares some of their numbers, and raises an exception where they cannot be used. Then a
    note is printed once, and they are never returned.
    """

    def __init__(
        self, what: str, load: Callable[[], Loaded], worth: int, without: str = "several times slower"
    ) -> None:
        self._what, self._load, self.worth, self._without = what, load, worth, without
        self._lock = threading.Lock()
        self._num_computed = 0
        self._is_settled = False
        self._loaded: Loaded | None = None

    def get(self, num_numbers: int) -> Loaded | None:
        """Return the functions, or None while fewer numbers than ``worth`` were asked for by calls of this method."""
        if not self._is_settled:
            with self._lock:
                self._num_computed += num_numbers
                if not self._is_settled and self._num_computed >= self.worth:
                    self._loaded = self._loaded_or_none()
                    self._is_settled = True
        return self._loaded

    def _loaded_or_none(self) -> Loaded | None:
        try:
            return self._load()
        except Exception as error:  # numba raises many kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            print(f"note: {self._what} are not compiled, and {self._without}: {reason}.", flush=True)
            return None
