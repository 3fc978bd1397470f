"""Write files atomically: to a temporary name, synced, then renamed, so that a file is complete or absent."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from core.reading import DamagedFileError, require_regular

_BLOCK_BYTES = 2**16


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that appears under ``path`` only when the block ends without an exception.

    It replaces any file of that name. Raises DamagedFileError where ``path`` is a folder.
    """
    require_no_folder(path)
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def require_no_folder(path: Path) -> None:
    """Raise DamagedFileError where ``path`` is a folder, which a file cannot replace."""
    if path.is_dir() and not path.is_symlink():
        raise DamagedFileError(f"{path} is a folder, but a file of that name is written there; remove it.")


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents. Raises DamagedFileError where one of them is a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        at_fault = next(place for place in (path, *path.parents) if os.path.lexists(place))
        raise DamagedFileError(f"{at_fault} is not a folder, but files are written below it; remove it.") from None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which appears under ``path``, synced, only when the block ends without an exception.

    It replaces whatever has that name.
    """
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        readable = aside.stat().st_mode & 0o666  # by the umask; some libraries write files only their owner can read
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(readable)
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        sync_folder(aside)
        if os.path.lexists(path):  # a run that replays a step saves it again
            remove_folder(path)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder, or whatever else has that name; the target of a link is kept.

    A crash leaves the folder complete, or renamed for `remove_leftovers`, but never partly deleted under its name.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    os.replace(path, aside)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    else:
        aside.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed writers in ``folder``. The caller must be the only writer."""
    for aside in folder.glob(".*.tmp"):
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_file(path) as file:
        file.write(content)


def append_line(path: Path, line: str) -> None:
    """Append one JSON line and sync it, after removing a last line that a crash truncated.

    A complete last line without a newline, as an editor may leave it, is kept. Raises DamagedFileError where the path
    is not a regular file, or its last line is not the start of a JSON object.
    """
    make_folder(path.parent)
    if path.exists():
        require_regular(path)
    with open(path, "ab+") as file:
        _end_last_line(path, file)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _end_last_line(path: Path, file: IO[bytes]) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) in (b"", b"\n"):
        return
    start = _start_of_last_line(file, size)
    file.seek(start)
    last = file.read()
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        if not last.startswith(b"{"):
            raise DamagedFileError(f"{path} ends with a line that is not JSON; remove that line.") from None
        file.truncate(start)
    else:
        file.write(b"\n")


def _start_of_last_line(file: IO[bytes], size: int) -> int:
    """Return the offset right after the last newline of a file."""
    end = size
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames in it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
