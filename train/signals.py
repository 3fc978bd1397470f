"""Handle the signals that ask a run to stop.

These are SIGTERM, from a scheduler or a preempted machine; SIGUSR2, from SLURM before a time limit; and SIGINT.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from core.progress import Progress, ProgressBar

if TYPE_CHECKING:  # importing PyTorch takes seconds, which `--help` need not spend
    from runtime.protocol import Processes

EX_TEMPFAIL = 75  # sysexits.h: temporary failure; schedulers requeue a job that exits with it
STOPS = (signal.SIGTERM, signal.SIGUSR2)  # of schedulers
SIGNALS = (*STOPS, signal.SIGINT)
ECHO_SEC = 1.0  # a launcher forwards a signal that the scheduler also sent to its processes


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to stop and has saved its state; the same command continues it."""


class StopSignals:
    """A context manager that remembers the first signal that asks to stop; a second one ends the process at once.

    A signal within ``ECHO_SEC`` of the first counts as the same one, and so does the SIGTERM with which SLURM follows
    its SIGUSR2, however late: the run may still be saving. A nested block takes over the signal that the
    outer one has received. Outside the main thread of a process, where Python allows no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since, self._first = 0.0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
                outer = getattr(self._before[number], "__self__", None)
                if isinstance(outer, StopSignals) and outer.requested:
                    self.requested, self._since, self._first = True, outer._since, outer._first
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since, self._first = True, now, number
            name = signal.Signals(number).name
            # Not print, since the signal may have interrupted a print.
            with suppress(OSError):  # the reader of standard error may be gone
                os.write(2, f"\n{name}: saving, then stopping; a second signal stops at once.\n".encode())
        elif now - self._since > ECHO_SEC and (self._first, number) != STOPS[::-1]:
            os._exit(128 + number)

    def agreed(self, runtime: "Processes", is_old: bool) -> tuple[bool, bool]:
        """Return whether any process was asked to stop, and whether any says ``is_old``. Every process must call it."""
        if runtime.data_world == 1:
            return self.requested, is_old
        found = runtime.gather(np.array([[self.requested, is_old]]))
        return bool(found[:, 0].any()), bool(found[:, 1].any())


def ask_to_stop() -> None:
    """Send SIGTERM to this process, unless it was asked to stop already: a second signal would interrupt its save.

    Outside a `StopSignals` block this ends the process.
    """
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not (isinstance(handler, StopSignals) and handler.requested):
        os.kill(os.getpid(), signal.SIGTERM)


def watched(progress: ProgressBar, check: Callable[[], None]) -> ProgressBar:
    """Return a progress bar that calls ``check`` at each update; ``check`` may raise to end the work."""

    @contextmanager
    def bar(label: str, done: int, total: int, unit: str) -> Iterator[Progress]:
        with progress(label, done, total, unit) as shown:
            yield _Watched(shown, check)

    return bar


class _Watched:
    def __init__(self, bar: Progress, check: Callable[[], None]) -> None:
        self._bar = bar
        self._check = check

    def update(self, n: int = 1) -> None:
        """Update the bar, then call the check."""
        self._bar.update(n)
        self._check()

    def note(self, text: str) -> None:
        """Show a note on the bar."""
        self._bar.note(text)
