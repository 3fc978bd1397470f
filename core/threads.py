"""Divide work on the rows of arrays between threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property


class Threads:
    """Threads for functions that release the GIL. With one, everything runs in the caller's."""

    def __init__(self, count: int = 1) -> None:
        assert count >= 1, "the caller's own thread is one"
        self.count = count

    def over_rows(self, num_rows: int, function: Callable[[slice], object]) -> None:
        """Call ``function`` for slices that together are range(num_rows), one for each thread, and wait for all.

        The caller's thread takes the first one. Raises the error of the first slice that has one, when none is running.
        """
        share = -(-num_rows // self.count)
        parts = [slice(first, min(first + share, num_rows)) for first in range(0, num_rows, max(1, share))]
        others = [self._pool.submit(function, part) for part in parts[1:]]
        try:
            if parts:
                function(parts[0])
        finally:
            errors = [other.exception() for other in others]
        for error in errors:
            if error is not None:
                raise error

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.count - 1, thread_name_prefix="rows")


ONE_THREAD = Threads()
