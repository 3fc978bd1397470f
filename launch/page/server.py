"""Serve the page at one address of this machine, until a signal ends it."""

import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

_WAITING = 64  # connections that wait for the page while the checkpoint is being loaded
_GRACE_SEC = 1  # for open connections, such as the one that images are sent through
_POLL_SEC = 0.5
_STOPS = (signal.SIGINT, signal.SIGTERM)
# The browser fetches nothing from another server, whatever the page or a name in a checkpoint asks for.
_POLICY = (
    b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    b"style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)
Application = Callable[..., Any]  # of ASGI: (scope, receive, send)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address of this machine.

    Raises ValueError where the port is in use or not allowed, or the machine has no such address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)  # localhost is 127.0.0.1
        listener = socket.socket(family, kind)
    except OSError as error:
        raise ValueError(f"host is {host}, which is not an address ({error.strerror}); use host=127.0.0.1.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a page that has just ended
        listener.bind(address)
        listener.listen(_WAITING)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {host} is in use by another program; set port={port + 1}.") from error
        if error.errno == errno.EACCES:
            raise ValueError(f"port {port} may not be used by this user; set one above 1023.") from error
        raise ValueError(f"host {host} cannot be served at ({error.strerror}); use host=127.0.0.1.") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of the page at a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ipaddress.ip_address(host).version == 6 else f"http://{host}:{port}"


def closed_to_others(application: Application) -> Application:
    """Return an application whose answers forbid the browser to fetch anything from another server."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY)]
            await send(message)

        await application(scope, receive, send_with_policy)

    return answer


@contextmanager
def served(application: Application, listener: socket.socket) -> Iterator[None]:
    """Serve an application at a socket, in a thread, within the block."""
    config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=_GRACE_SEC)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="server")
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """Yield a function that waits until the process gets SIGINT or SIGTERM, which end nothing within the block."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in _STOPS}

    def wait() -> None:
        # A signal that another thread receives does not wake this one, and only this one runs Python's handler.
        while not stopped.wait(_POLL_SEC):
            pass

    try:
        yield wait
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
