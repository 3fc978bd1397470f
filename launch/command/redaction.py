"""Keep the secrets of URLs out of all that a job prints: sentences, warnings, progress bars, tracebacks."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from core.atomic import write_bytes
from core.urls import hidden, secrets_in


class RedactedStream:
    """Writes to a stream what is left of a text without secrets. In all else it is that stream."""

    def __init__(self, stream: TextIO, secrets: frozenset[str]) -> None:
        self._stream, self._secrets = stream, secrets

    def write(self, text: str) -> int:
        """Write it without secrets; says that all of it was written."""
        self._stream.write(hidden(text, self._secrets))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def secrets_hidden(settings: Any) -> Iterator[None]:
    """While the block runs, print no secret of a URL in ``settings``, a config or the words of a command line."""
    secrets, before = secrets_in(settings), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (RedactedStream(stream, secrets) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def redact_file(path: Path, settings: Any) -> None:
    """Take the secrets of URLs in ``settings`` out of a text file that another library wrote."""
    before = path.read_text(encoding="utf-8")
    after = hidden(before, secrets_in(settings))
    if after != before:
        write_bytes(path, after.encode())


def exit_with_traceback(error: BaseException) -> NoReturn:
    """End as an exception ends a process that nobody catches, while secrets are still hidden."""
    traceback.print_exception(error)
    sys.exit(1)
