"""How the processes of a parallel sweep stop: asked to, or because the one that started them is gone."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from train.signals import ECHO_SEC, EX_TEMPFAIL, StopSignals

_asked_at: float | None = None  # in the process that started the workers
_stopped = False  # in a worker: the run that it trained was asked to stop, so it starts no other


def pass_on_signals() -> None:
    """From now on this process passes SIGTERM and SIGINT on to its workers, which save and stop, and waits for them.

    A second signal ends all at once.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_on)


def exit_if_asked() -> None:
    """Exit as one who wants to be started again, where a signal has stopped the sweep."""
    if _asked_at is not None:
        sys.exit(EX_TEMPFAIL)


def _pass_on(number: int, frame: FrameType | None) -> None:
    global _asked_at
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, number)
    now = time.monotonic()
    if _asked_at is None:
        _asked_at = now
    elif now - _asked_at > ECHO_SEC:
        os._exit(128 + number)


def in_worker() -> bool:
    """Whether this process is one of several that train the runs of a sweep."""
    return multiprocessing.current_process().name.startswith("Loky")


def run_in_worker(job: Callable[[], None]) -> None:
    """Train one run of a sweep. One that was asked to stop ends as others do, for joblib kills all for an exit."""
    global _stopped
    if _stopped:
        return
    _end_with_parent()
    with StopSignals() as signals:
        try:
            job()
        except SystemExit as stop:
            if stop.code != EX_TEMPFAIL:
                raise
            _stopped = True
    _stopped |= signals.requested


def _end_with_parent() -> None:
    """Let the parent's death, of kill -9, stop this process as SIGTERM does; it would wait for ever to be asked."""
    if not any(thread.name == _end_with_parent.__name__ for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(os.getppid(),), name=_end_with_parent.__name__, daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # a run is being saved
        time.sleep(0.1)
    os._exit(EX_TEMPFAIL)
