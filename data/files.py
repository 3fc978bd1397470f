"""List the files below one place, a local folder or a URL, and read them whole or in part, from any thread."""

import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.reading import DamagedFileError, open_regular, read_regular
from core.remote import Retry, files_below, is_remote, open_remote, with_retries
from data.local_tree import local_tree
from data.unread import LFS_REASON, is_lfs_pointer, is_litter, kind_of

MAX_FILE_BYTES = 2**31  # largest file that is read whole
LARGEST_POINTER_BYTES = 1024  # by the specification of Git LFS


class IsFileError(ValueError):
    """A file was given where a folder is wanted."""


def given(place: str | None, setting: str) -> str:
    """Return the place of a source. Raises ValueError where the config does not give it."""
    if not place:
        raise ValueError(f"data.source.{setting} is missing; give it as data.source.{setting}=PATH.")
    return place


class Listing:
    """The files of one place: a folder, a URL or a zip file."""

    place: str
    sizes: dict[str, int]  # bytes of each file, by its path below the place; sorted
    folders: list[str]  # at the first level; empty ones too, where the place lists them
    odd: dict[str, str]  # entries that are not files (a broken link, a pipe), and why each cannot be read
    is_near: bool  # whether the place is local, so that opening many files is cheap

    def with_suffix(self, *suffixes: str) -> list[str]:
        """Return the names with one of the suffixes, in any case, in order, without hidden files and litter."""
        return [name for name in self.sizes if name.lower().endswith(suffixes) and not is_litter(name)]

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the bytes start .. end - 1 of a file, or all of them. Raises OSError or ValueError."""
        raise NotImplementedError

    def refuse_pointer(self, name: str) -> None:
        """Raise ValueError where a file is a pointer of Git LFS."""
        size = self.sizes[name]
        if 0 < size <= LARGEST_POINTER_BYTES and is_lfs_pointer(self.read(name, 0, size)):
            raise ValueError(f"{self.place}/{name} {LFS_REASON}.")


class Files(Listing):
    """The files of a folder or URL; with ``recursive=False``, without those of its subfolders.

    Raises ValueError where the folder does not exist or may not be listed, and IsFileError where it is a file.
    """

    def __init__(self, place: str, recursive: bool = True) -> None:
        self.place = place
        self.is_near = not is_remote(place)
        self._system: Any = None
        if self.is_near:
            self._root = os.path.abspath(Path(place).expanduser())  # noqa: PTH100 - keeps links unresolved
            self._list_folder(recursive)
        else:
            self._list_remote()
        if not self.sizes and not self.odd:
            raise ValueError(f"There are no files in {place}; is it the right folder?")

    def _list_folder(self, recursive: bool) -> None:
        try:
            if stat.S_ISREG(Path(self._root).stat().st_mode):
                raise _is_file(self.place)
            self.sizes, self.folders, self.odd = local_tree(self._root, recursive)
        except PermissionError as error:
            raise ValueError(f"{self.place} cannot be listed ({error.strerror}); grant the permission.") from error
        except OSError as error:
            raise ValueError(
                f"There are no files in {self.place} ({error.strerror}); is it the right folder?"
            ) from error
        if {"blobs", "snapshots"} <= set(self.folders):
            raise _is_hub_cache(self.place, self.sizes)

    def _list_remote(self) -> None:
        self._system, root = open_remote(self.place)
        self._root = root.rstrip("/")
        found = self._try(self.place, lambda: dict(files_below(self._system, self._root)))
        if self._root in found:
            raise _is_file(self.place)
        prefix = len(self._root) + 1
        by_path = {path: info["size"] for path, info in found.items()}
        unknown = [path for path, size in by_path.items() if size is None]  # a web server's listing has no sizes
        by_path |= (
            zip(unknown, self._try(self.place, lambda: self._system.sizes(unknown)), strict=True) if unknown else ()
        )
        sizes = {path[prefix:]: int(size or 0) for path, size in by_path.items()}
        self.sizes, self.odd = dict(sorted(sizes.items())), {}
        self.folders = sorted({name.split("/")[0] for name in sizes if "/" in name and not is_litter(name)})

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the bytes start .. end - 1 of a file, or all of them.

        Raises ValueError where a server does not serve parts, where the file is no longer a regular file, and where
        the whole file is larger than ``MAX_FILE_BYTES``.
        """
        path = self._path(name)
        if end is None and self.sizes.get(name, 0) > MAX_FILE_BYTES:
            raise DamagedFileError(
                f"{path} has {self.sizes[name]} bytes, but at most {MAX_FILE_BYTES} are read of a file."
            )
        if self.is_near:
            return read_regular(path, MAX_FILE_BYTES) if start is end is None else _part(path, start or 0, end)
        content: bytes = self._try(path, lambda: self._system.cat_file(path, start=start, end=end))
        if end is not None and len(content) > end - (start or 0):
            raise ValueError(
                f"{path} was asked for {end - (start or 0)} bytes from {start or 0} on, but the server sent "
                f"{len(content)}: it does not serve parts of files; copy them to a folder or another store."
            )
        return content

    def open(self, name: str, buffer_bytes: int = 0) -> Any:
        """Return a seekable binary file object; for a remote file it reads ahead ``buffer_bytes``."""
        if self.is_near:
            return open_regular(self._path(name))
        file = _ReadInParts(self, name)
        return io.BufferedReader(file, buffer_bytes) if buffer_bytes else file

    def local_path(self, name: str) -> str | None:
        """Return the path of a local file, or None where the file is remote."""
        return self._path(name) if self.is_near else None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _try(self, path: str, action: Any) -> Any:
        return with_retries(path, action, Retry())


def _part(path: str, start: int, end: int | None) -> bytes:
    with open_regular(path) as file:
        file.seek(start)
        return file.read(-1 if end is None else max(0, end - start)) or b""


def _is_file(place: str) -> IsFileError:
    folder, kind = place.rstrip("/").rpartition("/")[0] or ".", kind_of(place)
    way_out = (
        kind.way_out.format(place=place, folder=folder, first=place)
        if kind
        else f"give the folder that contains it, {folder}"
    )
    return IsFileError(f"{place} is a file, but this source reads a folder; {way_out}.")


def _is_hub_cache(place: str, names: Iterable[str]) -> ValueError:
    """Return the error for a cache folder of the Hugging Face hub, which holds all revisions and their blobs."""
    revisions = sorted({name.split("/")[1] for name in names if name.startswith("snapshots/") and name.count("/") > 1})
    return ValueError(
        f"{place} is a cache folder of the Hugging Face hub with {len(revisions)} revisions; give one of them, "
        f"{place.rstrip('/')}/snapshots/{revisions[0] if revisions else 'REVISION'}, or a folder in it."
    )


class _ReadInParts(io.RawIOBase):
    """A remote file that is read in parts, with retries for each part."""

    def __init__(self, files: Files, name: str) -> None:
        super().__init__()
        self._files, self._name, self._position = files, name, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._files.sizes[self._name]}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._files.sizes[self._name])
        content = self._files.read(self._name, self._position, end) if self._position < end else b""
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
