"""Define a lock behind a URL: an object that its holder renews, since object stores have no locks.

A holder that dies leaves its object behind; a job that finds it waits for a renewal before it takes the lock over.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

from core import remote
from core.urls import redacted
from train.holder import Holder, read_holder, this_process

PERIOD_SEC = 10.0  # between two renewals
PATIENCE = 3  # periods without a renewal after which the holder counts as dead
MAX_BYTES = 2**16  # of a lock


class LeaseLostError(ValueError):
    """Another job took the lease over, because it saw no renewal by this one."""


class Seen(NamedTuple):
    """A lock as it was found. Any change of its content counts as a renewal, even if it cannot be parsed."""

    content: bytes
    holder: Holder | None


class Lease:
    """A lock that one job at a time holds. ``what`` names the locked thing in errors."""

    def __init__(self, url: str, what: str, period_sec: float = PERIOD_SEC) -> None:
        self._url, self._what, self._period_sec = url, redacted(what), period_sec
        self._me = this_process()
        self._ended = threading.Event()
        self._lost: LeaseLostError | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock while the block runs. Raises ValueError, after up to three periods, if another job holds it."""
        self._take()
        thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            if self._lost is None:
                with suppress(ValueError, FileNotFoundError):  # unreachable: the lock expires without renewals
                    remote.remove(self._url)

    def check(self) -> None:
        """Raise `LeaseLostError` where another job has taken over."""
        if self._lost is not None:
            raise self._lost

    def _take(self) -> None:
        seen = self._read()
        if seen is not None and not (seen.holder is not None and seen.holder.is_gone()):
            self._await_death(seen)
        self._write(0)
        time.sleep(self._period_sec / 10)  # a job that started at the same moment has written by then
        now = self._read()
        if now is None or not self._is_mine(now):
            raise self._refusal(now)

    def _await_death(self, seen: Seen) -> None:
        until = time.monotonic() + PATIENCE * self._period_sec
        while time.monotonic() < until:
            time.sleep(self._period_sec / 10)
            now = self._read()
            if now is None:
                return
            if now != seen:
                raise self._refusal(now)

    def _renew(self) -> None:
        beat = 0
        while not self._ended.wait(self._period_sec):
            try:
                now = self._read()
                if now is not None and not self._is_mine(now):
                    self._lost = LeaseLostError(str(self._refusal(now)))
                    return
                beat += 1
                self._write(beat)
            except ValueError:  # unreachable: a takeover by others is noticed once the store answers again
                continue

    def _is_mine(self, seen: Seen) -> bool:
        return seen.holder is not None and seen.holder.owner == self._me.owner

    def _refusal(self, seen: Seen | None) -> ValueError:
        holder = "its lock does not say which one" if seen is None or seen.holder is None else str(seen.holder)
        return ValueError(
            f"Another process is training in {self._what} ({holder}); wait for it, or give this run its own name=..."
        )

    def _read(self) -> Seen | None:
        try:
            content = remote.read_bytes(self._url, limit_bytes=MAX_BYTES)
        except FileNotFoundError:
            return None
        except remote.TooLargeError:
            return Seen(b"", None)
        return Seen(content, read_holder(content, redacted(self._url)))

    def _write(self, beat: int) -> None:
        remote.write_bytes(self._url, replace(self._me, beat=beat).to_json())
