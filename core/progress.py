"""How a long job tells of its advance; the command line decides how that looks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Progress(Protocol):
    """A bar that is shown while its context is open."""

    def update(self, n: int = 1) -> Any:
        """``n`` more are done."""
        ...

    def note(self, text: str) -> None:
        """Show a short text beside the bar from now on."""
        ...


# (label, done, total, unit) -> a bar that starts at ``done``.
ProgressBar = Callable[[str, int, int, str], AbstractContextManager[Progress]]
