"""A folder of bounded size that keeps files which were fetched from afar; the processes of a host share it.

A file is called by its SHA-256, so that data sets and jobs may share a folder. Whoever has a file mapped holds a
shared `flock` on the mapping's own descriptor: it ends with the mapping, also where the process is killed. A file
that is held is never evicted. Space for a file is reserved before it is fetched, so that the bound holds at
every moment. The folder must be on a local disk.

Files of other names are left alone: not read, not counted, not deleted. A pipe, a device or a link that has the name of
one of ours gives way to it.
"""

import fcntl
import hashlib
import mmap
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

POLL_SEC = 0.05
_KEPT = re.compile(r"[0-9a-f]{64}\.tar")
_RESERVED = re.compile(r"\.[0-9a-f]{64}\.(\d{1,18})\.reserved")
_OPEN = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # of what anyone may have put there


class CachedFile(NamedTuple):
    """What a file must be."""

    sha256: str
    bytes: int


class Cache:
    """Files up to ``limit_bytes`` together.

    ``needed`` holds the SHA-256 of files that are not to be evicted though they are not mapped yet. Safe to use
    from several threads. Raises ValueError where the folder cannot be made.
    """

    def __init__(self, folder: Path, limit_bytes: int, patience_sec: float = 600.0) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.needed: Collection[str] = frozenset()
        self._patience_sec = patience_sec
        self._verified: dict[str, int] = {}  # inode of each file that this process has read or fetched
        self.stopped = threading.Event()  # set: all waiting ends, in whatever thread
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache {folder} cannot be made ({error}); choose another folder.") from error
        require_own_file(folder / ".lock")
        require_locks(folder / ".lock")  # a file that is read is held by one
        # Held for moments only: nothing is fetched or read under it.
        self._lock = FileLock(folder / ".lock")

    def map(self, file: CachedFile, fetch: Callable[[Path], None], verify: bool) -> mmap.mmap:
        """The file's bytes, mapped; it cannot be evicted while the mapping lives.

        ``fetch(path)`` writes the file, checked, to ``path``; it is called where the cache has no sound copy and
        no other process is fetching one. ``verify`` reads a copy that this process has not read before.
        Raises what ``fetch`` raises, and ValueError where others hold all space for too long.
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
        """Return what the folder has of our files whose names match."""
        found = {}
        for path in self.folder.iterdir():
            if name.fullmatch(path.name):
                with suppress(FileNotFoundError):  # deleted by another job
                    found[path] = path.lstat()
        return {path: status for path, status in found.items() if stat.S_ISREG(status.st_mode)}

    def _map_present(self, file: CachedFile) -> tuple[mmap.mmap, int] | None:
        """A copy of the right size, mapped and held, and its inode; a copy of another size goes."""
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
            os.utime(descriptor)  # the time of its last use: the oldest is evicted first
            return _hold(descriptor), status.st_ino
        finally:
            os.close(descriptor)

    def _is_sound(self, file: CachedFile, mapped: mmap.mmap, inode: int) -> bool:
        """Whether a copy has its content, read once by this process; a damaged one goes."""
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
        """A locked reservation of space for the file, or None: another is fetching it, or no space is free yet."""
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
        """Reservations whose holders live; what killed ones left goes."""
        paths = []
        for path in self._files(_RESERVED):
            if _remove_unless_held(path):
                with suppress(IsADirectoryError):  # which none of ours is
                    self._aside(path).unlink(missing_ok=True)
            else:
                paths.append(path)
        return paths

    def _reservation(self, file: CachedFile) -> Path:
        return self.folder / f".{file.sha256}.{file.bytes}.reserved"

    @staticmethod
    def _aside(reservation: Path) -> Path:
        return reservation.with_suffix(".part")

    def _fill(self, file: CachedFile, reservation: int, fetch: Callable[[Path], None]) -> mmap.mmap:
        """Fetch into a file aside, sync, rename, and hold."""
        reserved = self._reservation(file)
        aside = self._aside(reserved)
        try:
            fetch(aside)
            descriptor = os.open(aside, os.O_RDWR)
            try:
                os.fsync(descriptor)
                mapped = _hold(descriptor)
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
            "being read by this and other jobs; raise data.cache_bytes, or give this job a data.cache of its own."
        )


def _hold(descriptor: int) -> mmap.mmap:
    """Map a file and hold it. The mapping keeps a duplicate of the descriptor, and with it the lock."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


def _remove_unless_held(path: Path) -> bool:
    """Delete a file that nobody holds; whether it is gone."""
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
    """Delete what has the name of one of our files but is none. Raises ValueError for a folder."""
    require_no_folder(path)
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            path.unlink()
    except FileNotFoundError:
        return


def _reservation_bytes(path: Path) -> int:
    return int(path.name.rsplit(".", 2)[1])
