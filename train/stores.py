"""Store checkpoints in a folder that all processes share, or in a bucket. Only complete ones are listed.

Several processes write the files of a checkpoint; it exists once the main process commits it.
"""

import os
import re
import shutil
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from core import remote
from core.atomic import atomic_folder, remove_folder, remove_leftovers, sync_folder
from core.locks import locked
from core.names import plain_name, tree_inside
from core.reading import DamagedFileError, is_regular, read_regular
from core.records import parse_object, validate
from train.checksums import Checksum, Hash64, recorded
from train.pins import STATE_FILE, CheckpointGoneError, unless_pinned

Result = TypeVar("Result")

MAX_STATE_BYTES = 2**26  # of each of a checkpoint's JSON files
FOLDER_NAME = re.compile(r"step_(\d{8})")
INDEX_ENDING = ".safetensors.index.json"
_BLOCK_BYTES = 32 * 2**20  # of an upload


def folder_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a local folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if FOLDER_NAME.fullmatch(path.name))


class CheckpointStore(Protocol):
    """The checkpoints of one run by their step. Storage errors are OSError, or ValueError for a bucket."""

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in order."""
        ...

    def place(self, step: int) -> str:
        """Return the path or URL of a checkpoint, for messages."""
        ...

    def local(self, step: int) -> Path:
        """Return a local folder with a complete checkpoint's files."""
        ...

    def write(self, step: int, name: str, content: Callable[[IO[bytes]], Result]) -> Result:
        """Write a file of an incomplete checkpoint by calling ``content``, and return the result of that call.

        ``content`` may be called again after a failure. Returns when the file is on disk.
        """
        ...

    def written(self, step: int) -> set[str]:
        """Return the names of the files of an incomplete checkpoint."""
        ...

    def read(self, step: int, name: str) -> bytes:
        """Return a JSON file of an incomplete checkpoint. Raises ValueError where it is too large."""
        ...

    def commit(self, step: int, state: bytes, drop: set[str]) -> None:
        """Complete the checkpoint: write ``state`` as its state file and delete the files ``drop``."""
        ...

    def abandon(self, step: int) -> None:
        """Delete the files of a checkpoint that will not be completed."""
        ...

    def remove(self, step: int) -> None:
        """Delete a complete checkpoint, unless it is pinned by a reader."""
        ...

    def clean(self, newest_good: int) -> None:
        """Delete the files that killed writers left behind. The caller must be the only writer.

        Checkpoints after ``newest_good`` are damaged, and will be written again.
        """
        ...


class FolderStore:
    """A folder on a file system that all processes share; a complete checkpoint is renamed into place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Return the steps of the folders that have a checkpoint's name."""
        return [step_of(path) for path in list_checkpoints(self.folder)]

    def place(self, step: int) -> str:
        """Return the path of the checkpoint's folder."""
        return str(self.local(step))

    def local(self, step: int) -> Path:
        """Return the checkpoint's folder."""
        return self.folder / folder_name(step)

    def write(self, step: int, name: str, content: Callable[[IO[bytes]], Result]) -> Result:
        """Write the file into a temporary folder, sync it, and rename it when it is whole."""
        path = self._aside(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{name}"), "wb") as file:
            result = content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
        return result

    def written(self, step: int) -> set[str]:
        """Return the names of the files in the temporary folder."""
        aside = self._aside(step)
        names = {path.name for path in aside.iterdir()} if aside.is_dir() else set()
        return {name for name in names if not name.startswith(".")}

    def read(self, step: int, name: str) -> bytes:
        """Return a file of the temporary folder."""
        return read_regular(self._aside(step) / name, MAX_STATE_BYTES)

    def commit(self, step: int, state: bytes, drop: set[str]) -> None:
        """Sync and rename the temporary folder, replacing a damaged checkpoint of the same step."""
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
        """Delete the temporary folder."""
        shutil.rmtree(self._aside(step), ignore_errors=True)

    def remove(self, step: int) -> None:
        """Hide the folder, then delete its files; a pinned one stays until a later call."""
        unless_pinned(self.local(step), remove_folder)

    def clean(self, newest_good: int) -> None:
        """Delete temporary folders; a damaged checkpoint stays until its step is saved again."""
        remove_leftovers(self.folder)

    def _aside(self, step: int) -> Path:
        return self.folder / f".{folder_name(step)}.tmp"


class BucketStore:
    """Objects below a URL; a checkpoint is complete when it has its state file, which is written last.

    ``copies`` is the local folder that checkpoints are fetched into. Every request is retried after a failure.
    """

    def __init__(self, url: str, copies: Path) -> None:
        self.url = url.rstrip("/")
        self._copies = copies
        self._system: Any
        self._system, self._root = remote.open_remote(self.url)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that have a state file."""
        return sorted(step for step, files in self._files().items() if STATE_FILE in files)

    def place(self, step: int) -> str:
        """Return the checkpoint's URL."""
        return f"{self.url}/{folder_name(step)}"

    def local(self, step: int) -> Path:
        """Return a local copy, fetched unless there is a sound one; processes of a host share it.

        Raises CheckpointGoneError if the checkpoint is deleted meanwhile, and UnsafeNameError, before anything is
        written, where its state file names files outside the folder.
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

    def _copy(self, step: int, state: bytes, hashes: Container[str], path: Path) -> None:
        """Fetch the files that the state file names, and their indices, but no other objects."""
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
        """Upload the file in blocks, again from its beginning after a failure."""

        def upload(path: str) -> Result:
            with self._system.open(path, "wb", block_size=_BLOCK_BYTES) as file:
                return content(file)

        return self._try(step, name, upload, "written")

    def written(self, step: int) -> set[str]:
        """Return the names of the objects of the checkpoint."""
        return set(self._files().get(step, {}))

    def read(self, step: int, name: str) -> bytes:
        """Return the content of an object."""
        return remote.read_bytes(f"{self.place(step)}/{name}", limit_bytes=MAX_STATE_BYTES)

    def commit(self, step: int, state: bytes, drop: set[str]) -> None:
        """Delete the files ``drop``, then write the state file, which makes the checkpoint complete."""
        for name in drop:
            self._try(step, name, self._system.rm_file, "removed")
        self.write(step, STATE_FILE, lambda file: file.write(state))

    def abandon(self, step: int) -> None:
        """Do nothing, since the store may be unreachable: the next start deletes the files."""

    def remove(self, step: int) -> None:
        """Delete the checkpoint, its state file first: files without it are not a checkpoint."""
        self._remove(step, self.written(step))

    def clean(self, newest_good: int) -> None:
        """Delete checkpoints that have no state file or are damaged."""
        for step, files in self._files().items():
            if STATE_FILE not in files or step > newest_good:
                self._remove(step, set(files))

    def _remove(self, step: int, names: set[str]) -> None:
        for name in sorted(names, key=lambda name: name != STATE_FILE):
            self._try(step, name, self._system.rm_file, "removed")

    def _files(self) -> dict[int, dict[str, int | None]]:
        """Return names and sizes of all objects by step. Raises UnsafeNameError for a name that leads out."""
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


@dataclass(frozen=True)
class _Hashes:
    """The fields of a state file that name its checkpoint's files."""

    sha256: dict[str, Hash64]
    blake3: dict[str, Hash64] = field(default_factory=dict)


def _hashes_in(state: bytes, name: str) -> dict[str, Checksum] | None:
    """Return the hash of each file that a state file names, or None if it is damaged, which its reader reports.

    Raises UnsafeNameError where one of them is not a plain file name.
    """
    try:
        hashes = validate(_Hashes, parse_object(state, name), name)
    except DamagedFileError:
        return None
    return {plain_name(file_name, name): value for file_name, value in recorded(asdict(hashes)).items()}


def _is_copy(path: Path, state: bytes, hashes: Mapping[str, Checksum]) -> bool:
    """Return whether a folder holds a state file with this content, and the files that it names."""
    try:
        return read_regular(path / STATE_FILE, MAX_STATE_BYTES) == state and all(
            is_regular(path / name) and expected.found_in(path / name) == expected.value
            for name, expected in hashes.items()
        )
    except (OSError, DamagedFileError):
        return False


def _room_for(size: int, folder: Path, place: str) -> int:
    """Return the free bytes of a folder's disk. Raises ValueError where a copy of ``size`` bytes does not fit."""
    if size > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"{place} has {size} bytes, but the disk of {folder} has room for {free}; make room there.")
    return free
