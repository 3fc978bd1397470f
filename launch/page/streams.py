"""Yield the views of work that runs in a thread, one piece of work after the other."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

ViewT = TypeVar("ViewT")
Show = Callable[[ViewT | None], None]  # shows a view, or none; it raises where nobody looks any more


class _LeftError(Exception):
    """Nobody reads the views any more."""


class Streams(Generic[ViewT]):
    """Runs work in threads. Each piece begins when the one before has ended, so that they do not share the device."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._is_closed = threading.Event()

    def views(self, work: Callable[[Show[ViewT]], None]) -> Iterator[ViewT]:
        """Yield what the work shows. Raises what the work raises.

        Work ends at its next view, or at the next call of its argument with None, once the iterator is closed.
        """
        shown: queue.SimpleQueue[ViewT | Exception | None] = queue.SimpleQueue()
        has_left = threading.Event()

        def show(view: ViewT | None) -> None:
            if has_left.is_set() or self._is_closed.is_set():
                raise _LeftError
            if view is not None:
                shown.put(view)

        def run() -> None:
            try:
                with self._turn:
                    show(None)
                    work(show)
            except Exception as error:
                shown.put(error)
            shown.put(None)

        threading.Thread(target=run, name="sampler", daemon=True).start()
        try:
            while (found := shown.get()) is not None:
                if isinstance(found, _LeftError):
                    return
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            has_left.set()

    def close(self) -> None:
        """End all work at its next view, and wait for that."""
        self._is_closed.set()
        with self._turn:
            pass
