"""Where checkpoints are kept: a folder that all processes see, or a bucket. Complete ones are listed, others are not.

A checkpoint is put together from files that several processes write; it exists once the main one commits it.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any, Protocol, TypeVar

from pydantic import Field

from core import remote
from core.atomic import atomic_folder, remove_folder, remove_leftovers, sync_folder
from core.locks import locked
from core.names import plain_name, tree_inside
from core.reading import DamagedFileError, is_regular, read_regular, sha256_of
from core.records import parse_object, validate
from train.pins import STATE_FILE, CheckpointGoneError, unless_pinned

Result = TypeVar("Result")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

MAX_STATE_BYTES = 2**26  # of a checkpoint's JSON files
FOLDER_NAME = re.compile(r"step_(\d{8})")
INDEX_ENDING = ".safetensors.index.json"
_BLOCK_BYTES = 32 * 2**20  # of an upload


def folder_name(step: int) -> str:
    """Of a checkpoint."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a local folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if FOLDER_NAME.fullmatch(path.name))


class CheckpointStore(Protocol):
    """Checkpoints of one run by their step. Errors of the place are OSError, or ValueError where it is a bucket."""

    def steps(self) -> list[int]:
        """Of the complete checkpoints, in order."""
        ...

    def place(self, step: int) -> str:
        """Path or URL of a checkpoint, for people."""
        ...

    def local(self, step: int) -> Path:
        """A folder of this machine with a complete checkpoint's files."""
        ...

    def write(self, step: int, name: str, content: Callable[[IO[bytes]], Result]) -> Result:
        """Write a file of a checkpoint that is not complete yet: what ``content`` writes, and returns what it returns.

        ``content`` may be called again after a failure. Returns when the file is on disk.
        """
        ...

    def written(self, step: int) -> set[str]:
        """Names of the files of a checkpoint that is not complete yet."""
        ...

    def read(self, step: int, name: str) -> bytes:
        """Return a JSON file of a checkpoint that is not complete yet. Raises ValueError for one that is too large."""
        ...

    def commit(self, step: int, state: bytes, drop: set[str]) -> None:
        """Make the checkpoint complete, with ``state`` as its state file and without the files ``drop``."""
        ...

    def abandon(self, step: int) -> None:
        """Take away what was written of a checkpoint that will not be completed."""
        ...

    def remove(self, step: int) -> None:
        """Delete a complete checkpoint, unless somebody is reading it here."""
        ...

    def clean(self, newest_good: int) -> None:
        """Take away what killed writers left, for a caller that knows of no other writer.

        Checkpoints after ``newest_good`` are damaged, and will be written again.
        """
        ...


class FolderStore:
    """A folder on a file system that all processes see; a checkpoint is renamed into its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Of the folders with a checkpoint's name."""
        return [step_of(path) for path in list_checkpoints(self.folder)]

    def place(self, step: int) -> str:
        """Its folder."""
        return str(self.local(step))

    def local(self, step: int) -> Path:
        """Its folder."""
        return self.folder / folder_name(step)

    def write(self, step: int, name: str, content: Callable[[IO[bytes]], Result]) -> Result:
        """Into the folder aside, synced; under its name when it is whole."""
        path = self._aside(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{name}"), "wb") as file:
            result = content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
        return result

    def written(self, step: int) -> set[str]:
        """Of the folder aside."""
        aside = self._aside(step)
        names = {path.name for path in aside.iterdir()} if aside.is_dir() else set()
        return {name for name in names if not name.startswith(".")}

    def read(self, step: int, name: str) -> bytes:
        """From the folder aside."""
        return read_regular(self._aside(step) / name, MAX_STATE_BYTES)

    def commit(self, step: int, state: bytes, drop: set[str]) -> None:
        """Sync and rename; a damaged checkpoint of the same step goes."""
        aside, path = self._aside(step), self.local(step)
        for name in drop:
            (aside / name).unlink()
        self.write(step, STATE_FILE, lambda file: file.write(state))
        sync_folder(aside)
        if path.exists():
            remove_folder(path)
        os.replace(aside, path)
        sync_folder(self.folder)

    def abandon(self, step: int) -> None:
        """Delete the folder aside."""
        shutil.rmtree(self._aside(step), ignore_errors=True)

    def remove(self, step: int) -> None:
        """First out of sight, then file by file; a pinned one stays, for the next that deletes old ones to find."""
        unless_pinned(self.local(step), remove_folder)

    def clean(self, newest_good: int) -> None:
        """Delete folders aside; a damaged checkpoint stays until its step is saved again."""
        remove_leftovers(self.folder)

    def _aside(self, step: int) -> Path:
        return self.folder / f".{folder_name(step)}.tmp"


class BucketStore:
    """Objects below a URL; a checkpoint is complete when its state file is there, which is put last.

    ``copies`` is a local folder that checkpoints are fetched into. Every request is tried again after a failure.
    """

    def __init__(self, url: str, copies: Path) -> None:
        self.url = url.rstrip("/")
        self._copies = copies
        self._system: Any
        self._system, self._root = remote.open_remote(self.url)

    def steps(self) -> list[int]:
        """Of the checkpoints that have a state file."""
        return sorted(step for step, files in self._files().items() if STATE_FILE in files)

    def place(self, step: int) -> str:
        """Its URL."""
        return f"{self.url}/{folder_name(step)}"

    def local(self, step: int) -> Path:
        """A copy, fetched where there is no sound one; processes of a host share it.

        Raises CheckpointGoneError where the checkpoint is deleted meanwhile, and UnsafeNameError, before anything is
        written, where its state file names files elsewhere.
        """
        path = self._copies / folder_name(step)
        try:
            state = self.read(step, STATE_FILE)
            hashes = _hashes_in(state, f"{self.place(step)}/{STATE_FILE}")
            self._copies.mkdir(parents=True, exist_ok=True)
            with locked(self._copies / f".{folder_name(step)}.lock"):
                if hashes is None or not _is_copy(path, state, hashes):
                    self._copy(step, state, hashes or {}, path)
        except FileNotFoundError as error:
            raise CheckpointGoneError(f"{self.place(step)} was deleted while it was read; choose another.") from error
        return path

    def _copy(self, step: int, state: bytes, hashes: dict[str, str], path: Path) -> None:
        """Fetch the files that the state file names, and their indices: nothing else that lies there."""
        files = self._files().get(step, {})
        if STATE_FILE not in files:
            raise FileNotFoundError(self.place(step))
        wanted = {name: size for name, size in files.items() if name in hashes or name.endswith(INDEX_ENDING)}
        room = _room_for(sum(size or 0 for size in wanted.values()), self._copies, self.place(step))
        with atomic_folder(path) as aside:
            for name, size in sorted(wanted.items()):
                limit = (room if size is None else size) if name in hashes else MAX_STATE_BYTES
                remote.fetch(f"{self.place(step)}/{name}", aside / name, limit)
            (aside / STATE_FILE).write_bytes(state)

    def write(self, step: int, name: str, content: Callable[[IO[bytes]], Result]) -> Result:
        """In blocks, from its beginning again after a failure."""

        def upload(path: str) -> Result:
            with self._system.open(path, "wb", block_size=_BLOCK_BYTES) as file:
                return content(file)

        return self._try(step, name, upload, "written")

    def written(self, step: int) -> set[str]:
        """As listed now."""
        return set(self._files().get(step, {}))

    def read(self, step: int, name: str) -> bytes:
        """The object."""
        return remote.read_bytes(f"{self.place(step)}/{name}", limit_bytes=MAX_STATE_BYTES)

    def commit(self, step: int, state: bytes, drop: set[str]) -> None:
        """The state file makes it complete."""
        for name in drop:
            self._try(step, name, self._system.rm_file, "removed")
        self.write(step, STATE_FILE, lambda file: file.write(state))

    def abandon(self, step: int) -> None:
        """Leave it to the next start: the place may be out of reach."""

    def remove(self, step: int) -> None:
        """The state file first: what is left without it is no checkpoint."""
        self._remove(step, self.written(step))

    def clean(self, newest_good: int) -> None:
        """Delete what has no state file, or is damaged."""
        for step, files in self._files().items():
            if STATE_FILE not in files or step > newest_good:
                self._remove(step, set(files))

    def _remove(self, step: int, names: set[str]) -> None:
        for name in sorted(names, key=lambda name: name != STATE_FILE):
            self._try(step, name, self._system.rm_file, "removed")

    def _files(self) -> dict[int, dict[str, int | None]]:
        """Names and bytes of all objects by their checkpoint's step. Raises UnsafeNameError for one that leads out."""
        found: dict[int, dict[str, int | None]] = {}
        for path, size in remote.list_sizes(self.url).items():
            tree_inside(self._copies, path, self.url)
            folder, _, name = path.rpartition("/")
            if match := FOLDER_NAME.fullmatch(folder):
                found.setdefault(int(match.group(1)), {})[name] = size
        return found

    def _try(self, step: int, name: str, action: Callable[[str], Result], done: str = "read") -> Result:
        path = f"{self._root}/{folder_name(step)}/{name}"
        return remote.with_retries(f"{self.place(step)}/{name}", lambda: action(path), remote.DEFAULT_RETRY, done=done)


def _hashes_in(state: bytes, name: str) -> dict[str, str] | None:
    """Return the SHA-256 of each file that a state file names, or None where it is damaged: for the reader to say.

    Raises UnsafeNameError where one of them is no plain name.
    """
    try:
        hashes = validate(dict[str, Sha256], parse_object(state, name).get("sha256"), name)
    except DamagedFileError:
        return None
    return {plain_name(file_name, name): value for file_name, value in hashes.items()}


def _is_copy(path: Path, state: bytes, hashes: dict[str, str]) -> bool:
    """Return whether a folder holds a state file of this content, and the files that it names."""
    try:
        return read_regular(path / STATE_FILE, MAX_STATE_BYTES) == state and all(
            is_regular(path / name) and sha256_of(path / name) == value for name, value in hashes.items()
        )
    except (OSError, DamagedFileError):
        return False


def _room_for(size: int, folder: Path, place: str) -> int:
    """Return the free bytes of a folder's disk. Raises ValueError where a copy of ``size`` bytes does not fit."""
    if size > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"{place} has {size} bytes, but the disk of {folder} has room for {free}; make room there.")
    return free
