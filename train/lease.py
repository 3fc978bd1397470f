"""A lock behind a URL: an object that its holder renews, since object stores have no locks.

A holder that dies leaves its object behind; who finds it waits for a sign of life before taking it over.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from data import remote

PERIOD_SEC = 10.0  # between two signs of life
PATIENCE = 3  # periods without one, after which the holder counts as dead


class LeaseLostError(ValueError):
    """Another job took the lease over, because it saw no sign of life of this one."""


class Lease:
    """Held by one job at a time. ``what`` is what it stands for, in errors."""

    def __init__(self, url: str, what: str, period_sec: float = PERIOD_SEC) -> None:
        self._url, self._what, self._period_sec = url, what, period_sec
        self._me = {"owner": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()}
        self._ended = threading.Event()
        self._lost: LeaseLostError | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises ValueError where another job holds it, which takes up to three periods to find out."""
        self._take()
        thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            if self._lost is None:
                with suppress(ValueError, FileNotFoundError):  # out of reach: it will be seen to be dead
                    remote.remove(self._url)

    def check(self) -> None:
        """Raise `LeaseLostError` where another job has taken over."""
        if self._lost is not None:
            raise self._lost

    def _take(self) -> None:
        seen = self._read()
        if seen is not None and not self._is_dead_here(seen):
            self._await_death(seen)
        self._write(0)
        time.sleep(self._period_sec / 10)  # who started in the same moment has written by then
        if (now := self._read()) is None or now.get("owner") != self._me["owner"]:
            raise self._refusal(now or {})

    def _await_death(self, seen: dict[str, Any]) -> None:
        until = time.monotonic() + PATIENCE * self._period_sec
        while time.monotonic() < until:
            time.sleep(self._period_sec / 10)
            now = self._read()
            if now is None:
                return
            if now != seen:
                raise self._refusal(now)

    def _is_dead_here(self, seen: dict[str, Any]) -> bool:
        """Whether the holder was a process of this machine, and is gone."""
        if seen.get("host") != self._me["host"]:
            return False
        try:
            os.kill(int(seen["pid"]), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError, KeyError):
            pass
        return False

    def _renew(self) -> None:
        beat = 0
        while not self._ended.wait(self._period_sec):
            try:
                now = self._read()
                if now is not None and now.get("owner") != self._me["owner"]:
                    self._lost = LeaseLostError(str(self._refusal(now)))
                    return
                beat += 1
                self._write(beat)
            except ValueError:  # out of reach: others take over after a while, and this is seen when it is back
                continue

    def _refusal(self, holder: dict[str, Any]) -> ValueError:
        return ValueError(
            f"Another process is training in {self._what} (host {holder.get('host')}, process {holder.get('pid')}); "
            "wait for it, or give this run its own name=..."
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(remote.read_bytes(self._url))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError:
            return {}
        return content

    def _write(self, beat: int) -> None:
        remote.write_bytes(self._url, json.dumps({**self._me, "beat": beat}).encode())
