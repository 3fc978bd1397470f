"""Lock files, with locks that end with their process, or with a marker file where the file system has no locks.

Some network file systems do not support ``flock`` and answer ENOLCK, EOPNOTSUPP, EIO or ENOSYS. All processes that use
such a folder get the same answer and fall back to the same marker, ``NAME.soft``. The marker of a local process that
has ended is taken over; that of a process on another machine must be removed by hand, so errors name it, as does the
note of a job that waits for it.
"""

import errno
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from core.atomic import make_folder
from core.reading import require_own_file

NOT_SUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EIO, errno.ENOSYS, errno.EINVAL}
_LEFT_TO_OTHERS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}  # explained by launch

NOTE_AFTER_SEC = 2.0  # how long a job waits for a marker, which may be stale, before it says so


class HeldError(Exception):
    """Another process holds the lock. ``hint`` tells the user about a marker that may be stale, or is empty."""

    def __init__(self, path: Path, hint: str) -> None:
        super().__init__(f"{path} is held by another process{hint}")
        self.hint = hint


def acquired(path: Path, timeout_sec: float = -1) -> BaseFileLock:
    """Return a held lock on ``path``; a timeout of -1 waits forever, with a note where a marker may be stale.

    Raises `HeldError` after the timeout, ValueError where the folder supports neither kind of lock, and OSError where
    there is no permission or no space.
    """
    make_folder(path.parent)
    require_own_file(path)
    marker = path.with_name(f"{path.name}.soft")
    try:
        return _acquired(FileLock(path, fallback_to_soft=False), timeout_sec, "")
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise _refusal(path, error) from error
    try:
        require_own_file(marker)
        hint = f" (if no job is running, on this machine or another, remove {marker})"
        lock = SoftFileLock(marker)
        if timeout_sec < 0:
            with suppress(HeldError):
                return _acquired(lock, NOTE_AFTER_SEC, hint)
            print(f"note: waiting for another process, which holds {path}{hint}.", file=sys.stderr, flush=True)
        return _acquired(lock, timeout_sec, hint)
    except OSError as error:
        raise _refusal(path, error) from error


def _acquired(lock: BaseFileLock, timeout_sec: float, hint: str) -> BaseFileLock:
    try:
        lock.acquire(timeout=timeout_sec)
    except Timeout:
        raise HeldError(Path(lock.lock_file), hint) from None
    return lock


def _refusal(path: Path, error: OSError) -> Exception:
    if error.errno in _LEFT_TO_OTHERS:
        return error
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    return ValueError(
        f"{path.parent} does not support locks ({name}: {error.strerror}), which keep two jobs from writing there at "
        "once; choose a folder on a file system that has them, such as a local disk."
    )


@contextmanager
def locked(path: Path, timeout_sec: float = -1) -> Iterator[None]:
    """Hold a lock while the block runs. Raises as `acquired` does."""
    lock = acquired(path, timeout_sec)
    try:
        yield
    finally:
        lock.release()


def require_locks(path: Path) -> None:
    """Raise ValueError where the file system of the lock file ``path`` has no locks that end with their process."""
    try:
        with FileLock(path, fallback_to_soft=False):
            pass
    except OSError as error:
        raise _refusal(path, error) from error


def share(descriptor: int) -> bool:
    """Take a shared lock on a file; return False where the file system has no locks."""
    return _flock(descriptor, fcntl.LOCK_SH)


def own(descriptor: int) -> bool:
    """Try to take an exclusive lock on a file; return False where others hold it or the file system has no locks."""
    try:
        return _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False


def _flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno in NOT_SUPPORTED:
            return False
        raise
    return True
