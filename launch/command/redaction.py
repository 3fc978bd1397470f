"""Keep the secrets of URLs out of everything that a job prints: messages, warnings, progress bars, tracebacks."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from core.atomic import write_bytes
from core.urls import hidden, secrets_in


class RedactedStream:
    """Wraps a stream and removes secrets from the text that is written to it. All else is passed to the stream."""

    def __init__(self, stream: TextIO, secrets: frozenset[str]) -> None:
        self._stream, self._secrets = stream, secrets

    def write(self, text: str) -> int:
        """Write a text without its secrets. Returns the length of the whole text, as callers expect."""
        self._stream.write(hidden(text, self._secrets))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each line without its secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def secrets_hidden(settings: Any) -> Iterator[None]:
    """Hide the secrets of URLs in ``settings``, a config or command-line words, from all output within the block."""
    secrets, before = secrets_in(settings), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (RedactedStream(stream, secrets) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def redact_file(path: Path, settings: Any) -> None:
    """Remove the secrets of URLs in ``settings`` from a text file that another library wrote."""
    before = path.read_text(encoding="utf-8")
    after = hidden(before, secrets_in(settings))
    if after != before:
        write_bytes(path, after.encode())


def exit_with_traceback(error: BaseException) -> NoReturn:
    """Print the traceback and exit with 1, as Python does for an uncaught exception, while secrets are still hidden."""
    traceback.print_exception(error)
    sys.exit(1)
