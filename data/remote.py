"""Files behind a URL: s3://, gs://, http:// and https://, by fsspec; whole files, tried again after a failure.

Keys and endpoints come from where each store's own tools take them: the environment or their config files.
"""

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback

Result = TypeVar("Result")

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}  # of each protocol


@dataclass(frozen=True)
class Retry:
    """How often a file is asked for, and how long without an answer an attempt lasts."""

    attempts: int = 8
    first_wait_sec: float = 0.5  # after the first failure; doubled after each further one
    longest_wait_sec: float = 30.0
    timeout_sec: float = 60.0  # to connect, and between two pieces of an answer


DEFAULT_RETRY = Retry()


class DamagedError(ValueError):
    """A file whose content is not the one expected."""


def is_remote(place: str | Path) -> bool:
    """Whether a folder or file is named by a URL."""
    return "://" in str(place)


def join(folder: str | Path, name: str) -> str:
    """The path or URL of a file in a folder."""
    return f"{str(folder).rstrip('/')}/{name}"


def open_remote(url: str, timeout_sec: float = Retry.timeout_sec) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the URL's path in it.

    Raises ValueError for a protocol that is none of ours, and where its package is missing.
    """
    protocol = url.split("://", 1)[0]
    if protocol not in PACKAGES:
        raise ValueError(
            f"{url} has the protocol {protocol}://, but files are read from {', '.join(f'{p}://' for p in PACKAGES)} "
            "or a local folder; use one of them."
        )
    try:
        if protocol == "gs":
            from data.google_storage import GoogleStorage

            return GoogleStorage(**_options(protocol, timeout_sec)), GoogleStorage._strip_protocol(url)
        system, path = fsspec.url_to_fs(url, **_options(protocol, timeout_sec))
    except ImportError as error:
        package = PACKAGES[protocol]
        raise ValueError(
            f"{url} needs the Python package {package}, which is not installed ({error}); run `pip install {package}`."
        ) from error
    if protocol == "s3":
        system.retries = 1  # `Retry` alone decides how often
    return system, path


def _options(protocol: str, timeout_sec: float) -> dict[str, Any]:
    """What makes a file system give up an attempt after ``timeout_sec`` of silence, and make no further one."""
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
    """What ``action`` returns, tried again with growing waits; ``url`` and what is ``done`` to it stand in errors.

    Raises FileNotFoundError at once, ValueError at once where access is refused, `DamagedError` where the last
    attempt ended with it, and else ValueError with the number of attempts and the last error. ``stopped`` ends
    the waiting.
    """
    stopped = stopped or threading.Event()
    wait_sec, attempt = retry.first_wait_sec, 0
    while True:
        attempt += 1
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # each file system has exceptions of its own
            if _is_refusal(error):
                raise ValueError(
                    f"{url} is refused ({type(error).__name__}: {error}); check the credentials."
                ) from error
            if attempt >= retry.attempts or stopped.wait(wait_sec):
                if isinstance(error, DamagedError):
                    raise
                raise ValueError(
                    f"{url} cannot be {done}: {attempt} attempts failed, the last with {type(error).__name__}: "
                    f"{error}; check the network and the store, then give the same command again."
                ) from error
            wait_sec = min(2 * wait_sec, retry.longest_wait_sec)


def _is_refusal(error: Exception) -> bool:
    """Whether asking again is no use: the store knows us not, or does not let us."""
    status = getattr(error, "status", None) or getattr(error, "code", None)  # of aiohttp, of gcsfs
    no_keys = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")  # of botocore
    forbidden = isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")  # gcsfs has no class for it
    return forbidden or status in (401, 403) or no_keys


def read_bytes(url: str, retry: Retry = DEFAULT_RETRY, limit_bytes: int | None = None) -> bytes:
    """Return a whole small file, of at most ``limit_bytes``. Raises as `with_retries` does."""
    if limit_bytes is not None:
        return with_retries(url, lambda: read_limited(url, limit_bytes, retry.timeout_sec), retry)
    system, path = open_remote(url, retry.timeout_sec)
    content: bytes = with_retries(url, lambda: system.cat_file(path), retry)
    return content


def read_limited(url: str, limit_bytes: int, timeout_sec: float) -> bytes:
    """Return a file, in one attempt that never takes more than ``limit_bytes``, whatever the server says or sends.

    Raises DamagedError for a larger file.
    """
    system, path = open_remote(url, timeout_sec)
    with tempfile.TemporaryDirectory() as folder:  # the one interface to pieces that all file systems have
        aside = Path(folder) / "content"
        system.get_file(path, str(aside), callback=_Limit(url, limit_bytes))
        return aside.read_bytes()


def write_bytes(url: str, content: bytes, retry: Retry = DEFAULT_RETRY) -> None:
    """Write a whole small file; object stores show it complete or not at all. Raises as `with_retries` does."""
    system, path = open_remote(url, retry.timeout_sec)
    with_retries(url, lambda: system.pipe_file(path, content), retry, done="written")


def list_names(url: str, retry: Retry = DEFAULT_RETRY) -> list[str]:
    """Names of the files in a folder, sorted; none where there is no such folder. Raises as `with_retries` does."""
    system, path = open_remote(url, retry.timeout_sec)

    def names() -> list[str]:
        try:
            return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in system.ls(path, detail=False))
        except FileNotFoundError:
            return []

    system.invalidate_cache()  # of listings
    return with_retries(url, names, retry)


def list_tree(url: str, retry: Retry = DEFAULT_RETRY) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted. Raises as `with_retries` does."""
    system, path = open_remote(url, retry.timeout_sec)
    prefix = len(path.rstrip("/")) + 1

    def names() -> list[str]:
        system.invalidate_cache()  # of listings
        return sorted(str(name)[prefix:] for name in system.find(path))

    return with_retries(url, names, retry)


def remove(url: str, retry: Retry = DEFAULT_RETRY) -> None:
    """Delete a file. Raises as `with_retries` does."""
    system, path = open_remote(url, retry.timeout_sec)
    with_retries(url, lambda: system.rm_file(path), retry, done="removed")


def download(url: str, to: Path, size: int, timeout_sec: float) -> None:
    """One attempt at a file of ``size`` bytes into ``to``, never writing more. Raises DamagedError for another size."""
    system, path = open_remote(url, timeout_sec)
    system.get_file(path, str(to), callback=_SizeCheck(url, size))
    if (found := to.stat().st_size) != size:
        raise _wrong_size(url, size, found)


class _Limit(Callback):
    """Stops a download that is larger than it may be."""

    def __init__(self, url: str, limit_bytes: int) -> None:
        super().__init__()
        self._url, self._limit = url, limit_bytes

    def set_size(self, size: int | None) -> None:
        if size is not None and size > self._limit:  # a smaller one may be that of an error's message
            raise self.too_large(size)

    def relative_update(self, inc: int = 1) -> None:
        self.value += inc
        if self.value > self._limit:
            raise self.too_large(self.value)

    def too_large(self, size: int) -> DamagedError:
        """Return what to raise."""
        return DamagedError(f"{self._url} has {size} bytes or more, but at most {self._limit} are read of it")


class _SizeCheck(_Limit):
    """Stops a download that is larger than the manifest says."""

    def too_large(self, size: int) -> DamagedError:
        """Return what to raise."""
        return _wrong_size(self._url, self._limit, size)


def _wrong_size(url: str, expected: int, found: int) -> DamagedError:
    return DamagedError(f"{url} is damaged: the manifest says {expected} bytes, the file has {found}")
