"""Stop the processes of a sweep or a launcher, on a signal or when the process that started them is gone."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from types import FrameType

from train.signals import ECHO_SEC, SIGNALS, ask_to_stop


class PassedOn:
    """Passes SIGTERM and SIGINT on to the processes that this one started, which save and stop; this one continues.

    A second signal ends all of them at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Receive signals within the block, and restore the former handlers after it."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        for process in active_children():
            process.terminate()
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
        elif now - self._since > ECHO_SEC:
            os._exit(128 + number)


def started_by_torchrun() -> bool:
    """Return whether torchrun, or ``accelerate launch`` through it, started and supervises this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def stop_without(parent: int) -> None:
    """Treat the death of ``parent``, the process that started this one, as a request to stop.

    After kill -9 of a launcher or a sweep, nothing else would ask its processes to stop: they would continue to train.
    """
    threading.Thread(target=_watch, args=(parent,), name="watch of the parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    ask_to_stop()
