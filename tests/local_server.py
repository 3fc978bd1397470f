"""A local HTTP server for the duration of a test."""

import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self


class LocalServer:
    """A server whose requests ``handler`` answers, as its ``owner``. Setting ``released`` ends hanging requests."""

    def __init__(self, handler: type["LocalHandler"], port: int = 0) -> None:
        self.faults: dict[str, list[str]] = {}
        self.calls: Counter[str] = Counter()
        self.released = threading.Event()
        owned = type("Handler", (handler,), {"owner": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), owned)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def met(self, call: str) -> str | None:
        """Count a request; return its fault, or None."""
        self.calls[call] += 1
        waiting = self.faults.get(call, [])
        return waiting.pop(0) if waiting else None

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()


class LocalHandler(http.server.BaseHTTPRequestHandler):
    """A handler that logs nothing to the terminal."""

    owner: Any

    def log_message(self, *_: Any) -> None:
        pass
