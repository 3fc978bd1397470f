"""Images in chunks: the unit of work that is divided over processes and that a killed evaluation keeps."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from data.atomic import sha256_of, write_bytes
from evaluation.features import Features


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


class ChunkStore:
    """Features of finished chunks in a folder named by what they are features of.

    A chunk counts only where its sidecar is there and has the file's hash. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        content = json.dumps(dict(identity or {}), sort_keys=True)
        self.plan = hashlib.sha256(content.encode()).hexdigest()
        self._folder = None if folder is None else folder / self.plan[:16]

    def read(self, chunk: Chunk) -> Features | None:
        """Its features, or None where they have to be made."""
        if self._folder is None:
            return None
        path = self._path(chunk)
        try:
            sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if sidecar != self._sidecar(chunk, sha256_of(path)):
                return None
            parts = load_file(path)
        except (OSError, ValueError, SafetensorError):
            return None
        return Features(**{name: parts.get(name) for name in Features._fields})  # type: ignore[arg-type]

    def write(self, chunk: Chunk, features: Features) -> None:
        """Keep them; the sidecar comes last."""
        if self._folder is None:
            return
        path = self._path(chunk)
        parts = {name: np.ascontiguousarray(part) for name, part in features._asdict().items() if part is not None}
        write_bytes(path, save(parts))
        write_bytes(path.with_suffix(".json"), json.dumps(self._sidecar(chunk, sha256_of(path))).encode())

    def clear(self) -> None:
        """Delete all chunks: their number is on record. For every process; hosts may share the folder or not."""
        if self._folder is not None:
            rmtree(self._folder, ignore_errors=True)

    def _path(self, chunk: Chunk) -> Path:
        assert self._folder is not None
        return self._folder / f"chunk-{chunk.number:06d}.safetensors"

    def _sidecar(self, chunk: Chunk, sha256: str) -> dict[str, Any]:
        return {"plan": self.plan, "first": chunk.first, "last": chunk.last, "sha256": sha256}
