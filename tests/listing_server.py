"""A local HTTP server that lists the folders of a tree, and asks for a user name and a password."""

import base64
import html
import http.server
from pathlib import Path

from local_server import LocalHandler, LocalServer


class ListingServer(LocalServer):
    """Serves ``folder``; ``links`` are additional links, to anything, in the listing of a path.

    With a ``login`` "user:password", it refuses requests without that login.
    """

    def __init__(self, folder: Path, login: str | None = None, links: dict[str, list[str]] | None = None) -> None:
        super().__init__(_Handler)
        self.folder, self.login, self.links = folder, login, links or {}

    @property
    def private_url(self) -> str:
        """Return the URL with the login in it."""
        return self.url.replace("://", f"://{self.login}@")


class _Handler(LocalHandler, http.server.BaseHTTPRequestHandler):
    owner: ListingServer

    def do_GET(self) -> None:
        self.owner.met(self.path)
        name = self.path.partition("?")[0].strip("/")
        path = self.owner.folder / name
        if not self._is_known():
            self._answer(401, b"who are you?", {"WWW-Authenticate": 'Basic realm="tests"'})
        elif path.is_dir():
            links = [f"{found.name}/" if found.is_dir() else found.name for found in sorted(path.iterdir())]
            links += self.owner.links.get(name, [])
            page = "".join(f'<a href="{html.escape(link)}">{html.escape(link)}</a>\n' for link in links)
            self._answer(200, page.encode(), {"Content-Type": "text/html"})
        elif path.is_file():
            self._answer(200, path.read_bytes(), {"Content-Type": "application/octet-stream"})
        else:
            self._answer(404, b"", {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _is_known(self) -> bool:
        given = self.headers.get("Authorization", "")
        login = self.owner.login
        return login is None or given == f"Basic {base64.b64encode(login.encode()).decode()}"

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
