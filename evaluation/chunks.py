"""Divide images into chunks, the unit of work that processes share and that a killed evaluation keeps."""

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
    """The images first .. last - 1."""

    number: int
    first: int
    last: int

    @property
    def indices(self) -> NDArray[np.int64]:
        """Return the indices of the images, [last - first]."""
        return np.arange(self.first, self.last, dtype=np.int64)


def chunks_of(num_images: int, size: int, rank: int, world: int) -> list[Chunk]:
    """Return every ``world``-th chunk, for the process ``rank``. The chunks do not depend on ``world``."""
    firsts = range(0, num_images, size)
    chunks = [Chunk(number, first, min(first + size, num_images)) for number, first in enumerate(firsts)]
    return chunks[rank::world]


TRAINING, EVALUATING = "train-", "evaluate-"  # prefixes of the labels of the two jobs
LOCK_NAME = ".lock"  # locked by the processes that use the chunks in its folder; released when they end


class ChunkStore:
    """The features of finished chunks, in a folder named by ``label`` and a hash of ``identity``.

    A chunk counts as finished only if its record exists and has the file's hash. Without a folder nothing is kept.
    """

    def __init__(
        self, folder: Path | None = None, identity: Mapping[str, Any] | None = None, label: str = "chunks"
    ) -> None:
        self.plan = canonical_hash(dict(identity or {}), spaced=True)
        self._folder = None if folder is None else folder / f"{label}-{self.plan[:16]}"

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep `discard` from deleting these chunks while the block runs. Several processes may use them at once."""
        if self._folder is None:
            yield
            return
        make_folder(self._folder)
        require_own_file(self._folder / LOCK_NAME)
        descriptor = os.open(self._folder / LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            share(descriptor)  # without file locks, chunks that are discarded meanwhile are computed again
            yield
        finally:
            os.close(descriptor)

    def read(self, chunk: Chunk) -> Features | None:
        """Return the features of a chunk, or None where they must be computed."""
        if self._folder is None:
            return None
        path = self._path(chunk)
        return unless_damaged(lambda: _parse(read_kept(path, self._identity(chunk)), chunk, path))

    def write(self, chunk: Chunk, features: Features) -> None:
        """Store the features of a chunk; the record is written last."""
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
    """Return the features in a chunk's file. Raises DamagedFileError where they do not fit the chunk's images."""
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
    """The chunks of evaluations during a run's training. Its ``origin`` determines the weights at each step.

    They belong to one run, which only one job trains; other jobs do not delete them.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any]) -> None:
        self._folder, self._origin = folder, dict(origin)
        self._label = f"{TRAINING}{canonical_hash(dict(origin), spaced=True)[:16]}-step_"

    def of_step(self, step: int) -> ChunkStore:
        """Return the chunks of the weights after ``step`` steps."""
        return ChunkStore(self._folder, {**self._origin, "step": step}, f"{self._label}{step:08d}")

    def discard_foreign(self, step: int) -> None:
        """Delete chunks of other origins, which this run will never use, when training begins at ``step``.

        At step 0 delete all chunks, since the initial weights (``init_from``) may have changed.
        """
        discard(self._folder, lambda name: _is_of_training(name) and (step == 0 or not name.startswith(self._label)))

    def discard_until(self, step: int) -> None:
        """Delete the chunks up to ``step``, whose results are recorded."""
        last = f"{self._label}{step:08d}~"
        discard(self._folder, lambda name: name.startswith(self._label) and name < last)


def discard_training(folder: Path) -> None:
    """Delete all chunks of evaluations during training, for a run that no longer evaluates."""
    discard(folder, _is_of_training)


def _is_of_training(name: str) -> bool:
    """Return whether chunks belong to training; those without a label are of earlier versions, and unused."""
    return not name.startswith(EVALUATING)


def discard(folder: Path, unwanted: Callable[[str], bool]) -> None:
    """Delete the chunk folders in ``folder`` whose name is ``unwanted``, except those that are in use.

    All processes may call it at once; hosts may share the folder or not.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if unwanted(path.name):
            _remove_unless_used(path)


def _remove_unless_used(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():  # not a chunk folder
        return
    try:
        require_own_file(path / LOCK_NAME)
        descriptor = os.open(path / LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o666)
    except (OSError, DamagedFileError):  # another process has just deleted it, or the lock is not a file
        return
    try:
        if own(descriptor):
            rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
