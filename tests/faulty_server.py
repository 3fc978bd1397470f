"""A local HTTP server that serves a folder, or another server's answers, with faults on demand."""

import http.server
import time
import urllib.error
import urllib.request
from pathlib import Path

from local_server import LocalHandler, LocalServer


class FaultyServer(LocalServer):
    """A server whose ``faults`` map a file name to those of its next requests; ``gets`` counts requests by name.

    Faults: "500", "403", "hang" (longer than any test waits), "cut" (the connection closes half-way), "flip" (one byte
    is changed), "short" (a shorter file).
    """

    def __init__(self, folder: Path | None = None, upstream: str | None = None, port: int = 0) -> None:
        super().__init__(_Handler, port)
        self.folder, self.upstream = folder, upstream
        self.gets = self.calls


class _Handler(LocalHandler, http.server.BaseHTTPRequestHandler):
    owner: FaultyServer

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        fault = self.owner.met(name)
        if fault == "hang":
            self.owner.released.wait(60)
            self.close_connection = True
            return
        if fault in ("500", "403"):
            return self._answer(int(fault), b"<Error><Code>InternalError</Code><Message>injected</Message></Error>")
        status, content = self._content()
        if fault == "flip":
            content = bytes([content[0] ^ 1]) + content[1:]
        elif fault == "short":
            content = content[:-512]
        self._answer(status, content, cut=fault == "cut")

    def do_HEAD(self) -> None:
        self._answer(*self._content())

    def _content(self) -> tuple[int, bytes]:
        if self.owner.folder is not None:
            path = self.owner.folder / self.path.lstrip("/")
            return (200, path.read_bytes()) if path.is_file() else (404, b"")
        url = f"{self.owner.upstream}{self.path}"
        request = urllib.request.Request(url, headers=dict(self.headers), method="GET")
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def _answer(self, status: int, content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            time.sleep(0.05)
            self.close_connection = True
