"""Cache remote files in a local folder of bounded size, which the processes of a host share.

A file is named by its SHA-256, so data sets and jobs may share a folder. A process that has a file mapped holds a
shared `flock` on the mapping's own descriptor; the lock ends with the mapping, also when the process is killed. A
locked file is never evicted. Space is reserved before a file is fetched, so the size limit holds at all times. The
folder must be on a local disk.

Files with other names are not read, counted or deleted. A pipe, device or link with the name of a cached file is
replaced by the file.
"""

import fcntl
import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from core.atomic import require_no_folder, sync_folder
from core.locks import require_locks
from core.names import sha256_name
from core.reading import require_own_file
from data.mapped_file import MappedFile

POLL_SEC = 0.05
_KEPT = re.compile(r"[0-9a-f]{64}\.tar")
_RESERVED = re.compile(r"\.[0-9a-f]{64}\.(\d{1,18})\.reserved")
_OPEN = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # others may have put pipes or links into the folder


class CachedFile(NamedTuple):
    """The expected hash and size of a file."""

    sha256: str
    bytes: int


class Cache:
    """A cache of files up to ``limit_bytes`` in total.

    ``needed`` holds the SHA-256 of files that must not be evicted although they are not mapped yet, and ``by_position``
    says how mapped files are read. Several threads
    may use it at once. Raises ValueError where the folder cannot be made.
    """

    def __init__(self, folder: Path, limit_bytes: int, patience_sec: float = 600.0) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.needed: Collection[str] = frozenset()
        self.by_position = True
        self._patience_sec = patience_sec
        self._verified: dict[str, int] = {}  # inode of each file that this process has verified or fetched
        self.stopped = threading.Event()  # when set, all threads stop waiting
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache {folder} cannot be made ({error}); choose another folder.") from error
        require_own_file(folder / ".lock")
        require_locks(folder / ".lock")  # mapped files are protected by locks
        # It is held for moments only: no file is fetched or read meanwhile.
        self._lock = FileLock(folder / ".lock")

    def map(self, file: CachedFile, fetch: Callable[[Path], None], verify: bool) -> MappedFile:
        """Return the file's bytes, mapped; the file cannot be evicted while the mapping exists.

        ``fetch(path)`` writes the verified file to ``path``; it is called where the cache has no undamaged copy and no
        other process is fetching one. ``verify`` hashes a copy that this process has not verified before. Raises what
        ``fetch`` raises, and ValueError where other jobs hold all space for too long.
        """
        give_up = time.monotonic() + self._patience_sec
        while True:
            with self._lock:
                present = self._map_present(file)
                reservation = None if present is not None else self._reserve(file)
            if present is not None:
                if not verify or self._is_sound(file, *present):
                    return present[0]
            elif reservation is not None:
                return self._fill(file, reservation, fetch)
            elif time.monotonic() > give_up or self.stopped.wait(POLL_SEC):
                raise ValueError(self._complaint(file))

    def _path(self, file: CachedFile) -> Path:
        return self.folder / f"{sha256_name(file.sha256, 'A manifest')}.tar"

    def _files(self, name: re.Pattern[str]) -> dict[Path, os.stat_result]:
        """Return the regular files in the folder whose names match, with their status."""
        found = {}
        for path in self.folder.iterdir():
            if name.fullmatch(path.name):
                with suppress(FileNotFoundError):  # deleted by another job
                    found[path] = path.lstat()
        return {path: status for path, status in found.items() if stat.S_ISREG(status.st_mode)}

    def _map_present(self, file: CachedFile) -> tuple[MappedFile, int] | None:
        """Return a copy of the right size, mapped and locked, and its inode; delete a copy of another size."""
        path = self._path(file)
        _give_way(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | _OPEN)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            if status.st_size != file.bytes:
                path.unlink()
                return None
            os.utime(descriptor)  # the least recently used file is evicted first
            return _hold(descriptor, self.by_position), status.st_ino
        finally:
            os.close(descriptor)

    def _is_sound(self, file: CachedFile, mapped: MappedFile, inode: int) -> bool:
        """Return whether a copy has the right hash, computed once per process; delete a damaged copy."""
        if self._verified.get(file.sha256) == inode:
            return True
        if hashlib.sha256(mapped).hexdigest() == file.sha256:
            self._verified[file.sha256] = inode
            return True
        with self._lock:
            path = self._path(file)
            if path.exists() and path.stat().st_ino == inode:
                path.unlink()
        return False

    def _reserve(self, file: CachedFile) -> int | None:
        """Reserve space for the file and return the locked descriptor.

        Returns None where another process is fetching the file, or no space is free yet.
        """
        reserved = {path: _reservation_bytes(path) for path in self._live_reservations()}
        if any(path.name.startswith(f".{file.sha256}.") for path in reserved):
            return None
        present = self._files(_KEPT)
        free = self.limit_bytes - sum(reserved.values()) - sum(status.st_size for status in present.values())
        for path in sorted(present, key=lambda path: present[path].st_mtime_ns):
            if free >= file.bytes:
                break
            if path.stem not in self.needed and _remove_unless_held(path):
                free += present[path].st_size
        if free < file.bytes:
            return None
        path = self._reservation(file)
        for other in (path, self._aside(path)):
            _give_way(other)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | _OPEN, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def _live_reservations(self) -> list[Path]:
        """Return the reservations of live processes; delete those of killed ones."""
        paths = []
        for path in self._files(_RESERVED):
            if _remove_unless_held(path):
                with suppress(IsADirectoryError):  # not made by this program
                    self._aside(path).unlink(missing_ok=True)
            else:
                paths.append(path)
        return paths

    def _reservation(self, file: CachedFile) -> Path:
        return self.folder / f".{file.sha256}.{file.bytes}.reserved"

    @staticmethod
    def _aside(reservation: Path) -> Path:
        return reservation.with_suffix(".part")

    def _fill(self, file: CachedFile, reservation: int, fetch: Callable[[Path], None]) -> MappedFile:
        """Fetch into a temporary file, sync, rename, and return the locked mapping."""
        reserved = self._reservation(file)
        aside = self._aside(reserved)
        try:
            fetch(aside)
            descriptor = os.open(aside, os.O_RDWR)
            try:
                os.fsync(descriptor)
                mapped = _hold(descriptor, self.by_position)
                self._verified[file.sha256] = os.fstat(descriptor).st_ino
            finally:
                os.close(descriptor)
            with self._lock:
                os.replace(aside, self._path(file))
                reserved.unlink()
            sync_folder(self.folder)
            return mapped
        except BaseException:
            with self._lock:
                aside.unlink(missing_ok=True)
                reserved.unlink(missing_ok=True)
            raise
        finally:
            os.close(reservation)

    def _complaint(self, file: CachedFile) -> str:
        held = sum(status.st_size for status in self._files(_KEPT).values())
        return (
            f"The cache {self.folder} has no room for {file.bytes} more bytes: of its {self.limit_bytes}, {held} are "
            "in use by this and other jobs; raise data.cache_bytes, or give this job a data.cache of its own."
        )


def _hold(descriptor: int, by_position: bool) -> MappedFile:
    """Map a file and lock it. The mapping keeps a duplicate of the descriptor, and thus the lock."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return MappedFile.of(descriptor, by_position)


def _remove_unless_held(path: Path) -> bool:
    """Delete a file unless a process has it locked; return whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _OPEN)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        path.unlink()
        return True
    finally:
        os.close(descriptor)


def _give_way(path: Path) -> None:
    """Delete anything that has the name of a cached file but is not a regular file. Raises ValueError for a folder."""
    require_no_folder(path)
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            path.unlink()
    except FileNotFoundError:
        return


def _reservation_bytes(path: Path) -> int:
    return int(path.name.rsplit(".", 2)[1])
