"""How long a host is asked again to which no connection is made: briefly, unless it has answered this process before.

At the start of a job such an address is most likely a wrong one, and the user is waiting. A job under way has met the
host already, so the network is away for a moment, and giving up would cost more than waiting.
"""

import errno
import socket

IMPATIENT_ATTEMPTS = 4  # to connect to a host that never answered: 3.5 seconds of waiting between them
IMPATIENT_SEC = 5.0  # after which no further attempt is made

_NO_WAY_THERE = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}
_answered: set[str] = set()  # hosts, and buckets, that this process got an answer from


def cannot_connect(error: BaseException) -> bool:
    """Return whether an error says that nobody listens: connection refused, an unknown name, no route.

    A connection that is neither made nor refused in time says nothing: a host that is too busy looks the same.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, socket.gaierror) or (isinstance(found, OSError) and found.errno in _NO_WAY_THERE):
            return True
        found = found.__cause__ or found.__context__
    return False


def note_answer(url: str) -> None:
    """Remember that the host of a URL is there."""
    _answered.add(_host_of(url))


def has_answered(url: str) -> bool:
    """Return whether the host of a URL has answered this process before."""
    return _host_of(url) in _answered


def is_timeout(error: BaseException) -> bool:
    """Return whether an error says that no answer came in time."""
    return any("Timeout" in kind.__name__ for kind in type(error).__mro__)  # each library has classes of its own


def _host_of(url: str) -> str:
    """Return protocol and host of a URL, or its bucket; of a path in a file system, the bucket."""
    protocol, mark, rest = url.rpartition("://")
    return protocol + mark + rest.partition("/")[0].rpartition("@")[2]
