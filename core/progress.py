"""Define how a long job reports its progress; the command line decides how to show it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Progress(Protocol):
    """A bar that is shown while its context is open."""

    def update(self, n: int = 1) -> Any:
        """Add ``n`` to what is done."""
        ...

    def note(self, text: str) -> None:
        """Show a short text next to the bar from now on."""
        ...


# (label, done, total, unit) -> a bar that starts at ``done``.
ProgressBar = Callable[[str, int, int, str], AbstractContextManager[Progress]]
