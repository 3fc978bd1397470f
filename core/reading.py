"""Read untrusted files: only regular files of bounded size, with errors of one sentence that name the file."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

MAX_RECORD_BYTES = 2**28  # largest file that is read whole to be parsed
_PIECE_BYTES = 2**24
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class DamagedFileError(ValueError):
    """A file is damaged or of the wrong kind. The message names it."""


@contextmanager
def remedied(remedy: str) -> Iterator[None]:
    """Append ``remedy`` to the message of each DamagedFileError of the block."""
    try:
        yield
    except DamagedFileError as error:
        raise DamagedFileError(f"{str(error).removesuffix('.')}; {remedy}.") from None


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file, or a link to one, for reading, and never block, as opening a named pipe would.

    Raises OSError as `open` does, and DamagedFileError for a folder, pipe, device, socket or circular link.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedFileError(f"{path} is a link that leads back to itself, but it must be a file.") from None
        raise
    _require_kind(path, mode)  # before opening: opening a device can have side effects
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_kind(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def is_regular(path: Path | str) -> bool:
    """Return whether there is an accessible regular file, or a link to one."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False


def require_regular(path: Path | str) -> None:
    """Raise OSError as `open` does, and DamagedFileError where the path is not a regular file, without reading it."""
    open_regular(path).close()


def require_own_file(path: Path) -> None:
    """Raise DamagedFileError where the path of a file that is written in place has anything else, including a link."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a link")
        raise DamagedFileError(f"{path} is {kind}, but it must be a file; remove it.")


def read_regular(path: Path | str, limit_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """Return the content of a regular file. Raises as `open_regular` does, and DamagedFileError for a larger one."""
    with open_regular(path) as file:
        found: list[bytes] = []
        num_read, size = 0, os.fstat(file.fileno()).st_size
        # A file may grow, or report no size. A first piece of the whole file is not copied.
        while size <= limit_bytes and (piece := file.read(_PIECE_BYTES if found else max(size, _PIECE_BYTES))):
            found.append(piece)
            num_read += len(piece)
            size = max(size, num_read)
    if size > limit_bytes:
        raise DamagedFileError(f"{path} has {size} bytes, but at most {limit_bytes} are read of it.")
    return b"".join(found)


def read_text(path: Path | str, limit_bytes: int = MAX_RECORD_BYTES) -> str:
    """Return a UTF-8 file as text. Raises as `read_regular` does, and DamagedFileError for invalid UTF-8."""
    try:
        return read_regular(path, limit_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(
            f"{path} is not text in UTF-8: byte {error.start} is {error.object[error.start]}."
        ) from None


def sha256_of(path: Path | str) -> str:
    """Return the hexadecimal SHA-256 of a regular file's content. Raises as `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_kind(path: Path | str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise DamagedFileError(f"{path} is {kind_of_node(mode)}, but it must be a file.")


def kind_of_node(mode: int) -> str:
    """Return the kind of a path that is not a regular file: a folder, a named pipe, a device or a socket."""
    return _KINDS.get(stat.S_IFMT(mode), "not a file")


def reason(error: Exception, path: Path | str) -> str:
    """Return an error's message without the file's name, for a sentence that already names the file."""
    return str(error).removeprefix(f"{path} is damaged: ").removeprefix(f"{path} ").rstrip(".")


def is_absent(error: OSError) -> bool:
    """Return whether an error of `open` says that the file does not exist, also where a parent is not a folder."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR)
