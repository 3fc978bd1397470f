"""Images in chunks: the unit of work that is divided over processes and that a killed evaluation keeps."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from core.atomic import make_folder
from core.locks import own, share
from core.reading import DamagedFileError, require_own_file
from core.records import canonical_hash
from evaluation.features.extractor import Features
from evaluation.kept import read_kept, unless_damaged, write_kept


@dataclass(frozen=True)
class Chunk:
    """Images first .. last - 1."""

    number: int
    first: int
    last: int

    @property
    def indices(self) -> NDArray[np.int64]:
        """[last - first]."""
        return np.arange(self.first, self.last, dtype=np.int64)


def chunks_of(num_images: int, size: int, rank: int, world: int) -> list[Chunk]:
    """The chunks of one of ``world`` processes: every ``world``-th. Chunks do not depend on ``world``."""
    firsts = range(0, num_images, size)
    chunks = [Chunk(number, first, min(first + size, num_images)) for number, first in enumerate(firsts)]
    return chunks[rank::world]


TRAINING, EVALUATING = "train-", "evaluate-"  # how labels of the two jobs begin
LOCK_NAME = ".lock"  # shared by the processes that use the chunks beside it; dies with them


class ChunkStore:
    """Features of finished chunks in a folder named by what they are features of: ``label``, then a hash of it all.

    A chunk counts only where its record is there and has the file's hash. Without a folder nothing is kept.
    """

    def __init__(
        self, folder: Path | None = None, identity: Mapping[str, Any] | None = None, label: str = "chunks"
    ) -> None:
        self.plan = canonical_hash(dict(identity or {}), spaced=True)
        self._folder = None if folder is None else folder / f"{label}-{self.plan[:16]}"

    @contextmanager
    def used(self) -> Iterator[None]:
        """While the block runs, `discard` leaves these chunks alone. Several processes may use them at once."""
        if self._folder is None:
            yield
            return
        make_folder(self._folder)
        require_own_file(self._folder / LOCK_NAME)
        descriptor = os.open(self._folder / LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            share(descriptor)  # where there are no locks, what is discarded meanwhile is made again
            yield
        finally:
            os.close(descriptor)

    def read(self, chunk: Chunk) -> Features | None:
        """Return its features, or None where they have to be made."""
        if self._folder is None:
            return None
        path = self._path(chunk)
        return unless_damaged(lambda: _parse(read_kept(path, self._identity(chunk)), chunk, path))

    def write(self, chunk: Chunk, features: Features) -> None:
        """Keep them; the record comes last."""
        if self._folder is None:
            return
        parts = {name: np.ascontiguousarray(part) for name, part in features._asdict().items() if part is not None}
        write_kept(self._path(chunk), save(parts), self._identity(chunk))

    def _path(self, chunk: Chunk) -> Path:
        assert self._folder is not None
        return self._folder / f"chunk-{chunk.number:06d}.safetensors"

    def _identity(self, chunk: Chunk) -> dict[str, Any]:
        return {"plan": self.plan, "first": chunk.first, "last": chunk.last}


def _parse(content: bytes, chunk: Chunk, path: Path) -> Features:
    """Return the features in a chunk's file. Raises DamagedFileError where they are not those of so many images."""
    try:
        parts = load(content)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}.") from None
    for name, part in parts.items():
        dtype, dimensions = (np.int64, 1) if name == "classes" else (np.float32, 2)
        if name not in Features._fields or part.dtype != dtype or part.ndim != dimensions:
            raise DamagedFileError(f"{path} is damaged: it holds {name} of {part.dtype} {part.shape}.")
        if len(part) != chunk.last - chunk.first or not np.isfinite(part).all():
            raise DamagedFileError(f"{path} is damaged: {name} is not of {chunk.last - chunk.first} images.")
    if "vectors" not in parts:
        raise DamagedFileError(f"{path} is damaged: it holds no vectors.")
    return Features(**{name: parts.get(name) for name in Features._fields})  # type: ignore[arg-type]


class TrainingChunks:
    """Chunks of the evaluations during a run's training: of its ``origin``, which decides the weights of each step.

    Of one process's run, which no other trains; other jobs leave them alone.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any]) -> None:
        self._folder, self._origin = folder, dict(origin)
        self._label = f"{TRAINING}{canonical_hash(dict(origin), spaced=True)[:16]}-step_"

    def of_step(self, step: int) -> ChunkStore:
        """Those of the weights after ``step`` steps."""
        return ChunkStore(self._folder, {**self._origin, "step": step}, f"{self._label}{step:08d}")

    def discard_foreign(self, step: int) -> None:
        """When training begins at ``step``: delete those that it will not come to, of other origins.

        At step 0 all of them: nothing says that the weights to start with (``init_from``) are still the same.
        """
        discard(self._folder, lambda name: _is_of_training(name) and (step == 0 or not name.startswith(self._label)))

    def discard_until(self, step: int) -> None:
        """Delete those up to ``step``, whose number is on record."""
        last = f"{self._label}{step:08d}~"
        discard(self._folder, lambda name: name.startswith(self._label) and name < last)


def discard_training(folder: Path) -> None:
    """Delete all chunks of evaluations during training: for a run that makes none any more."""
    discard(folder, _is_of_training)


def _is_of_training(name: str) -> bool:
    """What has neither label is of an earlier version of this program, which no later one reads."""
    return not name.startswith(EVALUATING)


def discard(folder: Path, unwanted: Callable[[str], bool]) -> None:
    """Delete the chunk folders in ``folder`` whose name is ``unwanted``, except those that are in use.

    Every process may call it at once; hosts may share the folder or not.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if unwanted(path.name):
            _remove_unless_used(path)


def _remove_unless_used(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():  # none of ours
        return
    try:
        require_own_file(path / LOCK_NAME)
        descriptor = os.open(path / LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o666)
    except (OSError, DamagedFileError):  # another process has just deleted it, or its lock is none
        return
    try:
        if own(descriptor):
            rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
