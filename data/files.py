"""Files below one place, a local folder or a URL: listed once, read whole or in part, from any thread."""

import io
import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from data.remote import Retry, files_below, is_remote, open_remote, with_retries


def given(place: str | None, setting: str) -> str:
    """The place, which a config leaves open. Raises ValueError where it was not given."""
    if place is None:
        raise ValueError(f"data.source.{setting} is missing; give it as data.source.{setting}=PATH.")
    return place


class Files:
    """Every file at or below ``place``. Raises ValueError where there is no such folder."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._system: Any
        self._system, self._root = (
            open_remote(place) if is_remote(place) else (LocalFileSystem(), str(Path(place).resolve()))
        )
        self._root = self._root.rstrip("/")
        found = self._try(place, lambda: dict(files_below(self._system, self._root)))
        prefix = len(self._root) + 1
        by_path = {path: info["size"] for path, info in found.items()}
        unknown = [path for path, size in by_path.items() if size is None]  # a web server's listing has no sizes
        by_path |= zip(unknown, self._try(place, lambda: self._system.sizes(unknown)), strict=True) if unknown else ()
        sizes = {path[prefix:]: int(size or 0) for path, size in by_path.items()}
        self.sizes: dict[str, int] = dict(sorted(sizes.items()))  # bytes of each file, by its path below the place
        if not found:
            raise ValueError(f"There are no files in {place}; is it the right folder?")

    def with_suffix(self, *suffixes: str) -> list[str]:
        """Names that end so, upper or lower case, in their order; hidden files are left out."""
        return [
            name
            for name in self.sizes
            if name.lower().endswith(suffixes) and not any(part.startswith(".") for part in name.split("/"))
        ]

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes start .. end - 1 of a file, or all of them. Raises ValueError where a server sends no parts."""
        path = self._path(name)
        content: bytes = self._try(path, lambda: self._system.cat_file(path, start=start, end=end))
        if end is not None and len(content) > end - (start or 0):
            raise ValueError(
                f"{path} was asked for {end - (start or 0)} bytes from {start or 0} on, but the server sent "
                f"{len(content)}: it does not serve parts of files; copy them to a folder or another store."
            )
        return content

    def open(self, name: str, buffer_bytes: int = 0) -> Any:
        """A seekable binary file object; of a remote file, it reads ahead that many bytes."""
        if not is_remote(self.place):
            return self._system.open(self._path(name), "rb")
        file = _ReadInParts(self, name)
        return io.BufferedReader(file, buffer_bytes) if buffer_bytes else file

    def local_path(self, name: str) -> str | None:
        """The path of a file on this machine, or None where it is elsewhere."""
        return None if is_remote(self.place) else self._path(name)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _try(self, path: str, action: Any) -> Any:
        return with_retries(path, action, Retry()) if is_remote(self.place) else action()


class _ReadInParts(io.RawIOBase):
    """A remote file; each part that is asked for is tried again after a failure."""

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
