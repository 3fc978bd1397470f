"""Pin checkpoints: retention does not delete a checkpoint's folder until its reader is done, or dies.

A pin is a shared `flock` on the checkpoint's state file, which needs no permission to write. File systems without
such locks (some network ones) have no pins: a reader there may find its checkpoint deleted, and takes the next one.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from core.reading import DamagedFileError, require_regular

STATE_FILE = "state.json"


class CheckpointGoneError(ValueError):
    """A checkpoint was deleted before its reader could pin it."""


@contextmanager
def pinned(checkpoint: Path) -> Iterator[None]:
    """Keep retention from deleting a checkpoint's folder while the block runs.

    Raises CheckpointGoneError if it is being deleted. The reader reports any other fault of the folder.
    """
    path = checkpoint / STATE_FILE
    descriptor = _opened(path, os.O_RDONLY)
    if descriptor is None:
        yield
        return
    with _locked(descriptor, fcntl.LOCK_SH) as is_mine:
        if not is_mine or not _is_at(path, descriptor):
            raise CheckpointGoneError(f"The checkpoint {checkpoint} was deleted while it was read; choose another.")
        yield


def unless_pinned(checkpoint: Path, remove: Callable[[Path], None]) -> None:
    """Call ``remove(checkpoint)`` unless a reader has pinned it; no reader can pin it meanwhile."""
    path = checkpoint / STATE_FILE
    descriptor = _opened(path, os.O_RDWR)  # NFS grants an exclusive lock only to a writable descriptor
    descriptor = _opened(path, os.O_RDONLY) if descriptor is None else descriptor
    if descriptor is None:
        remove(checkpoint)
        return
    with _locked(descriptor, fcntl.LOCK_EX) as is_mine:
        if is_mine:
            remove(checkpoint)


def _opened(path: Path, mode: int) -> int | None:
    """Return a descriptor of a file, or None where it does not exist or cannot be opened in this mode."""
    try:
        require_regular(path)
        return os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, DamagedFileError):
        return None


@contextmanager
def _locked(descriptor: int, kind: int) -> Iterator[bool]:
    """Lock a file until the block ends, then close it. Yields False if another process holds a conflicting lock."""
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child process may hold the descriptor, too
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether a path still refers to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
