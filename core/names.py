"""Turn names that were read from a file, an index or a bucket into paths; no other module does this.

Such a name is untrusted. It becomes a path only inside its intended folder: no separators where a plain name is
expected, no ``..``, no absolute path, no link that leads out.
"""

import re
from pathlib import Path, PurePosixPath

_LONGEST = 255  # bytes of a file's name on every usual file system
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class UnsafeNameError(ValueError):
    """A name in a file or in a bucket is not a path within the intended folder. The message gives both."""


def plain_name(name: object, said_by: str) -> str:
    """Return a name unchanged if it is a plain file name; ``said_by`` is the file that it was read from.

    Raises UnsafeNameError for anything else: a path, a hidden file, an empty or too long name, or a non-string.
    """
    if not isinstance(name, str) or name.startswith(".") or not _is_part(name):
        raise UnsafeNameError(
            f"{said_by} names the file {_shown(name)}, which is not a plain file name; it is not read."
        )
    return name


def inside(folder: Path, name: object, said_by: str) -> Path:
    """Return the path of a plain name in ``folder``. Raises UnsafeNameError where a link leads out of the folder."""
    return _without_leaving(folder, folder / plain_name(name, said_by), said_by)


def tree_inside(folder: Path, name: object, said_by: str) -> Path:
    """Return the path below ``folder`` of a name that may contain ``/``, as an object store lists them.

    Raises UnsafeNameError for ``..``, an empty part or an absolute path, and where a link leads out of the folder.
    """
    return _without_leaving(folder, folder / PurePosixPath(tree_name(name, said_by)), said_by)


def tree_name(name: object, said_by: str) -> str:
    """Return a name that may contain ``/``. Raises UnsafeNameError for ``..``, an empty part or an absolute path."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if not all(part not in (".", "..") and _is_part(part) for part in parts):
        raise UnsafeNameError(f"{said_by} has the name {_shown(name)}, which leads out of its folder; it is not read.")
    assert isinstance(name, str)
    return name


def sha256_name(value: object, said_by: str) -> str:
    """Return the SHA-256 that names a file. Raises UnsafeNameError unless it is 64 lowercase hexadecimal digits."""
    if not isinstance(value, str) or _SHA256.fullmatch(value) is None:
        raise UnsafeNameError(f"{said_by} has the sha256 {_shown(value)}, but one is 64 hexadecimal digits.")
    return value


def _is_part(name: str) -> bool:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= _LONGEST and not _CONTROL.search(name) and not any(mark in name for mark in "/\\")


def _without_leaving(folder: Path, path: Path, said_by: str) -> Path:
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        is_inside = False
    if not is_inside:
        raise UnsafeNameError(f"{path}, which {said_by} names, is a link out of {folder}; put the file itself there.")
    return path


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 100 else f"{text[:100]}..."
