"""Progress with rate and ETA: a bar on a terminal, and a line at intervals in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Never

from tqdm import tqdm

from core.progress import Progress, ProgressBar

QUIET_INTERVAL_SEC = 20.0


class _Bar:
    """A tqdm bar."""

    def __init__(self, bar: "tqdm[Never]") -> None:
        self._bar = bar

    def update(self, n: int = 1) -> None:
        """Advance."""
        self._bar.update(n)

    def note(self, text: str) -> None:
        """Show a text at the end of the bar from now on."""
        self._bar.set_postfix_str(text, refresh=False)


class _Lines:
    """Prints whole lines for a log file: at intervals, and at the end."""

    def __init__(self, name: str, done: int, total: int, unit: str) -> None:
        self._name, self._done, self._total, self._unit = name, done, total, unit
        self._text, self._first = "", done
        self._start = self._shown_at = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Advance, and print a line if the last one is old enough."""
        self._done += n
        now = time.monotonic()
        if now - self._shown_at >= QUIET_INTERVAL_SEC:
            self._shown_at = now
            self.show()

    def note(self, text: str) -> None:
        """Append a text to each further line."""
        self._text = text

    def show(self) -> None:
        """Print the progress so far."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._first) / elapsed
        left = (self._total - self._done) / rate if rate else 0.0
        when = (
            f"{tqdm.format_interval(left)} left" if self._done < self._total else f"in {tqdm.format_interval(elapsed)}"
        )
        share = 100 * self._done / self._total if self._total else 100.0
        parts = [
            f"{self._name}: {self._done}/{self._total} {self._unit} ({share:.0f}%)",
            f"{rate:.3g} {self._unit}/s",
            when,
        ]
        print(", ".join([*parts, *([self._text] if self._text else [])]), file=sys.stderr, flush=True)


def make_progress(name: str = "", row: int = 0, enabled: bool = True) -> ProgressBar:
    """Return a function that makes a job's bars; ``row`` is its line on a terminal that several jobs share."""

    def bar(label: str, done: int, total: int, unit: str) -> AbstractContextManager[Progress]:
        full_name = f"{name} {label}".strip()
        on_terminal = sys.stderr.isatty()
        return (
            _on_terminal(full_name, done, total, unit, row, enabled)
            if on_terminal or not enabled
            else _in_log(full_name, done, total, unit)
        )

    return bar


@contextmanager
def _on_terminal(name: str, done: int, total: int, unit: str, row: int, enabled: bool) -> Iterator[Progress]:
    with tqdm(
        desc=name,
        initial=done,
        total=total,
        unit=unit,
        position=row,
        leave=row == 0,
        disable=not enabled,
        dynamic_ncols=True,
    ) as shown:
        yield _Bar(shown)


@contextmanager
def _in_log(name: str, done: int, total: int, unit: str) -> Iterator[Progress]:
    lines = _Lines(name, done, total, unit)
    yield lines
    lines.show()
