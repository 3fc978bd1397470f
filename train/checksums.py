"""Hash the bytes of a checkpoint's files: by BLAKE3, and by XXH3 of 128 bits, seven times as fast on one core.

BLAKE3 identifies a file to the world, and cannot be forged. XXH3 finds damage as surely, so it is the one that is
checked where a run continues from its own checkpoint, or is replayed. SHA-256, which earlier versions wrote, is slower
than both.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import xxhash
from blake3 import blake3
from pydantic import Field

from core.reading import open_regular

Hash64 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # SHA-256 or BLAKE3
Hash32 = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]  # XXH3


class Hasher(Protocol):
    """A hash that is fed piece by piece."""

    def update(self, piece: bytes | memoryview, /) -> object:
        """Hash more bytes."""
        ...

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far, in hexadecimal."""
        ...


_ALGORITHMS: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "blake3": blake3, "xxh3_128": xxhash.xxh3_128}


@dataclass(frozen=True)
class Checksum:
    """The recorded hash of a file, and the algorithm by which it was computed."""

    algorithm: str  # as it is named in state.json
    value: str  # hexadecimal

    def hasher(self) -> Hasher:
        """Return a hash of this algorithm, of no bytes yet."""
        hasher: Hasher = _ALGORITHMS[self.algorithm]()
        return hasher

    def found_in(self, path: Path) -> str:
        """Return the hash that a file has now. Raises as `open_regular` does."""
        with open_regular(path) as file:
            return hashlib.file_digest(file, _ALGORITHMS[self.algorithm]).hexdigest()


@dataclass(frozen=True)
class Checksums:
    """Both hashes of a file of tensors."""

    blake3: str
    xxh3_128: str


def recorded(state: Mapping[str, Any]) -> dict[str, Checksum]:
    """Return the hash that identifies each file of a checkpoint, by its name, from the fields of its state file."""
    by_algorithm = ((algorithm, state.get(algorithm, {})) for algorithm in ("sha256", "blake3"))
    return {name: Checksum(algorithm, value) for algorithm, found in by_algorithm for name, value in found.items()}
