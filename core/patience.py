"""Decide how long to retry a host that accepts no connection: briefly, unless it has answered this process before.

At the start of a job, such an address is most likely wrong and the user is waiting. Once the host has answered, the
failure is most likely a short network outage, and giving up would cost more than waiting.
"""

import errno
import socket

IMPATIENT_ATTEMPTS = 4  # to connect to a host that never answered, with 3.5 seconds of waits in total
IMPATIENT_SEC = 5.0  # no attempt starts later than this

_NO_WAY_THERE = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}
_answered: set[str] = set()  # hosts and buckets that have answered this process


def cannot_connect(error: BaseException) -> bool:
    """Return whether an error means that the host is unreachable: connection refused, unknown name or no route.

    A timeout does not count: a busy host looks the same.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, socket.gaierror) or (isinstance(found, OSError) and found.errno in _NO_WAY_THERE):
            return True
        found = found.__cause__ or found.__context__
    return False


def note_answer(url: str) -> None:
    """Record that the host of a URL has answered."""
    _answered.add(_host_of(url))


def has_answered(url: str) -> bool:
    """Return whether the host of a URL has answered this process before."""
    return _host_of(url) in _answered


def is_timeout(error: BaseException) -> bool:
    """Return whether an error says that no answer came in time."""
    return any("Timeout" in kind.__name__ for kind in type(error).__mro__)  # each library has its own classes


def _host_of(url: str) -> str:
    """Return protocol and host (or bucket) of a URL, or the bucket of a path without protocol."""
    protocol, mark, rest = url.rpartition("://")
    return protocol + mark + rest.partition("/")[0].rpartition("@")[2]
