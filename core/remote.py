"""Read and write whole files behind a URL (s3://, gs://, http://, https://) with fsspec and retries.

Credentials and endpoints come from the environment or config files that each store's own tools use.
"""

import posixpath
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import fsspec
from fsspec.callbacks import Callback

from core.patience import (
    IMPATIENT_ATTEMPTS,
    IMPATIENT_SEC,
    cannot_connect,
    has_answered,
    is_timeout,
    note_answer,
)
from core.reading import MAX_RECORD_BYTES
from core.urls import MARK, is_redacted, redacted

Result = TypeVar("Result")

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}  # by protocol
WEB = ("http://", "https://")
_WEB_DEPTH = 8  # of nested folders: a listing may link to itself and would be infinite


@dataclass(frozen=True)
class Retry:
    """The number of attempts at a file, the waits between them, and the timeout of each attempt."""

    attempts: int = 8
    first_wait_sec: float = 0.5  # after the first failure; doubled after each further one
    longest_wait_sec: float = 30.0
    timeout_sec: float = 60.0  # to connect, and between two pieces of a response


DEFAULT_RETRY = Retry()


class UnusableUrlError(ValueError):
    """A URL cannot be opened at all: its protocol is unsupported, its package is missing, or its keys are misplaced."""


class DamagedError(ValueError):
    """A remote file does not have the expected content."""


class TooLargeError(DamagedError):
    """A remote file is larger than its limit; a retry is pointless."""


def is_remote(place: str | Path) -> bool:
    """Return whether a place is a URL."""
    return "://" in str(place)


def join(folder: str | Path, name: str) -> str:
    """Return the path or URL of a file in a folder."""
    return f"{str(folder).rstrip('/')}/{name}"


def open_remote(url: str, timeout_sec: float = Retry.timeout_sec) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the URL's path in it.

    Raises ValueError for an unsupported protocol, for a missing package, and for a URL that was redacted or contains
    keys that belong in the environment.
    """
    protocol = url.split("://", 1)[0]
    _require_usable(url, protocol)
    try:
        if protocol == "gs":
            from core.google_storage import GoogleStorage

            return GoogleStorage(**_options(protocol, timeout_sec)), GoogleStorage._strip_protocol(url)
        system, path = fsspec.url_to_fs(url, **_options(protocol, timeout_sec))
    except ImportError as error:
        package = PACKAGES[protocol]
        raise UnusableUrlError(
            f"{redacted(url)} needs the Python package {package}, which is not installed ({error}); run `pip install "
            f"{package}`."
        ) from error
    if protocol == "s3":
        system.retries = 1  # only `Retry` decides on retries
    return system, path


def _require_usable(url: str, protocol: str) -> None:
    if protocol not in PACKAGES:
        raise UnusableUrlError(
            f"{redacted(url)} has the protocol {protocol}://, but files are read from "
            f"{', '.join(f'{p}://' for p in PACKAGES)} or a local folder; use one of them."
        )
    if is_redacted(url):
        raise UnusableUrlError(
            f"{url} has {MARK} where a password or key was: files store none; give the whole URL again."
        )
    if not url.startswith(WEB) and "@" in url.split("://", 1)[1].partition("/")[0]:
        raise UnusableUrlError(
            f"{redacted(url)} has keys before its bucket, but those of {protocol}:// are taken from the environment; "
            "set them there."
        )


def _options(protocol: str, timeout_sec: float) -> dict[str, Any]:
    """Return the options that make a file system end an attempt after ``timeout_sec`` without data, and not retry."""
    if protocol == "s3":
        settings = {"connect_timeout": timeout_sec, "read_timeout": timeout_sec, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": settings}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_sec, sock_read=timeout_sec)
    return {"requests_timeout": timeout} if protocol == "gs" else {"client_kwargs": {"timeout": timeout}}


def with_retries(
    url: str,
    action: Callable[[], Result],
    retry: Retry,
    stopped: threading.Event | None = None,
    done: str = "read",
) -> Result:
    """Return the result of ``action``, with retries after growing waits; errors contain ``url`` and the verb ``done``.

    Attempts at a host that accepts no connection and has never answered end within seconds (`core.patience`). Raises
    FileNotFoundError and `TooLargeError` at once, ValueError at once where access is denied, `DamagedError` where the
    last attempt ended with it, and otherwise ValueError with the number of attempts and the last error. Setting
    ``stopped`` ends the retries.
    """
    stopped, started = stopped or threading.Event(), time.monotonic()
    wait_sec, attempt = retry.first_wait_sec, 0
    while True:
        attempt += 1
        try:
            result = action()
        except UnusableUrlError:
            raise
        except (FileNotFoundError, TooLargeError):
            note_answer(url)
            raise
        except Exception as error:  # each file system raises its own exceptions
            if not (cannot_connect(error) or is_timeout(error)):
                note_answer(url)
            if _is_refusal(error) or _is_enough(url, error, attempt, started, retry) or stopped.wait(wait_sec):
                _give_up(url, error, attempt, done)
            wait_sec = min(2 * wait_sec, retry.longest_wait_sec)
        else:
            note_answer(url)
            return result


def _is_enough(url: str, error: Exception, attempt: int, started: float, retry: Retry) -> bool:
    """Return whether this was the last attempt."""
    if not cannot_connect(error) or has_answered(url):
        return attempt >= retry.attempts
    return attempt >= min(retry.attempts, IMPATIENT_ATTEMPTS) or time.monotonic() - started > IMPATIENT_SEC


def _give_up(url: str, error: Exception, attempts: int, done: str) -> NoReturn:
    """Raise an error of one sentence on the last failure, without secrets."""
    if isinstance(error, DamagedError):
        raise error
    shown, reason = redacted(url), redacted(f"{type(error).__name__}: {error}")
    if _is_refusal(error):
        raise ValueError(f"{shown} is refused ({reason}); check the credentials.") from error
    if cannot_connect(error) and not has_answered(url):
        raise ValueError(
            f"{shown} cannot be {done}: there is no connection to its host ({attempts} attempts failed, the last with "
            f"{reason}); check the address and the network, then give the same command again."
        ) from error
    raise ValueError(
        f"{shown} cannot be {done}: {attempts} attempts failed, the last with {reason}; check the network and the "
        "store, then give the same command again."
    ) from error


def _is_refusal(error: Exception) -> bool:
    """Return whether a retry is pointless: the store rejected the credentials or denied access."""
    status = getattr(error, "status", None) or getattr(error, "code", None)  # of aiohttp, of gcsfs
    no_keys = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")  # of botocore
    forbidden = isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")  # gcsfs has no class for it
    return forbidden or status in (401, 403) or no_keys


def read_bytes(url: str, retry: Retry = DEFAULT_RETRY, limit_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """Return a whole small file. Raises as `with_retries` does, and `TooLargeError` above ``limit_bytes``."""
    return with_retries(url, lambda: read_limited(url, limit_bytes, retry.timeout_sec), retry)


def fetch(url: str, to: Path, limit_bytes: int, retry: Retry = DEFAULT_RETRY) -> None:
    """Download a file to ``to``, never more than ``limit_bytes`` of it. Raises as `read_bytes` does."""
    system, path = open_remote(url, retry.timeout_sec)
    with_retries(url, lambda: system.get_file(path, str(to), callback=_Limit(url, limit_bytes)), retry)


def read_limited(url: str, limit_bytes: int, timeout_sec: float) -> bytes:
    """Return a file, in one attempt that never reads more than ``limit_bytes``, whatever the server states or sends.

    Raises TooLargeError for a larger file.
    """
    system, path = open_remote(url, timeout_sec)
    with tempfile.TemporaryDirectory() as folder:  # only get_file has a callback per piece in all file systems
        aside = Path(folder) / "content"
        system.get_file(path, str(aside), callback=_Limit(url, limit_bytes))
        return aside.read_bytes()


def write_bytes(url: str, content: bytes, retry: Retry = DEFAULT_RETRY) -> None:
    """Write a whole small file; object stores show it complete or not at all. Raises as `with_retries` does."""
    system, path = open_remote(url, retry.timeout_sec)
    with_retries(url, lambda: system.pipe_file(path, content), retry, done="written")


def list_names(url: str, retry: Retry = DEFAULT_RETRY) -> list[str]:
    """Return the sorted names of the files in a folder; none if it does not exist. Raises as `with_retries` does."""
    system, path = open_remote(url, retry.timeout_sec)

    def names() -> list[str]:
        try:
            return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in system.ls(path, detail=False))
        except FileNotFoundError:
            return []

    system.invalidate_cache()  # of listings
    return with_retries(url, names, retry)


def list_tree(url: str, retry: Retry = DEFAULT_RETRY) -> list[str]:
    """Return the sorted paths of all files below a folder, relative to it. Raises as `with_retries` does."""
    return sorted(list_sizes(url, retry))


def list_sizes(url: str, retry: Retry = DEFAULT_RETRY) -> dict[str, int | None]:
    """Return the size in bytes of each file below a folder, by relative path; None where the listing has no sizes.

    The names are untrusted: use `core.names` to turn them into paths. Raises as `with_retries` does.
    """
    system, path = open_remote(url, retry.timeout_sec)
    root = f"{path.rstrip('/')}/"

    def listed() -> dict[str, int | None]:
        system.invalidate_cache()  # of listings
        return {
            name.removeprefix(root): info.get("size")
            for name, info in files_below(system, path)
            if name.startswith(root) and not name.endswith("/")  # such an object stands for a folder
        }

    return with_retries(url, listed, retry)


def files_below(system: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and description of each file below a path of a file system. The size may be missing."""
    if path.startswith(WEB):
        yield from _linked_files(system, path)
        return
    for name, info in system.find(path, detail=True).items():
        if info["type"] == "file":
            yield str(name), info


def _linked_files(system: Any, url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the files of a web server's listings; fsspec's own `find` omits folders that it fails to read.

    Links are normalized (``./a`` is ``a``). A link that leads out of the folder or has parameters (such as the sort
    order of the listing) is skipped.
    """
    root = f"{url.rstrip('/')}/"
    waiting = [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            listing = system.ls(folder.rstrip("/"), detail=True)
        except FileNotFoundError:
            continue
        for info in listing:
            name = posixpath.normpath(str(info["name"]).removeprefix(root))
            if name == "." or name.startswith(("..", "/")) or "?" in name or "#" in name:
                continue
            if info["type"] != "directory":
                yield root + name, info
            elif depth < _WEB_DEPTH and f"{root}{name}/" != folder:
                waiting.append((f"{root}{name}/", depth + 1))


def remove(url: str, retry: Retry = DEFAULT_RETRY) -> None:
    """Delete a file. Raises as `with_retries` does."""
    system, path = open_remote(url, retry.timeout_sec)
    with_retries(url, lambda: system.rm_file(path), retry, done="removed")


def download(url: str, to: Path, size: int, timeout_sec: float) -> None:
    """Download ``size`` bytes to ``to`` in one attempt, never writing more. Raises DamagedError for another size."""
    system, path = open_remote(url, timeout_sec)
    system.get_file(path, str(to), callback=_SizeCheck(url, size))
    if (found := to.stat().st_size) != size:
        raise _wrong_size(url, size, found)


class _Limit(Callback):
    """A callback that stops a download above its size limit."""

    def __init__(self, url: str, limit_bytes: int) -> None:
        super().__init__()
        self._url, self._limit_bytes = url, limit_bytes

    def set_size(self, size: int | None) -> None:
        if size is not None:  # a size below the limit proves nothing: it may be that of an error page
            self._require(size)

    def relative_update(self, inc: int = 1) -> None:
        self.value += inc
        self._require(self.value)

    def too_large(self, size: int) -> DamagedError:
        """Return what to raise."""
        return TooLargeError(
            f"{redacted(self._url)} has {size} bytes or more, but at most {self._limit_bytes} are read of it"
        )

    def _require(self, size: int) -> None:
        if size > self._limit_bytes:
            raise self.too_large(size)


class _SizeCheck(_Limit):
    """A callback that stops a download above the size in the manifest."""

    def too_large(self, size: int) -> DamagedError:
        """Return what to raise."""
        return _wrong_size(self._url, self._limit_bytes, size)


def _wrong_size(url: str, expected: int, found: int) -> DamagedError:
    return DamagedError(f"{redacted(url)} is damaged: the manifest says {expected} bytes, the file has {found}")
