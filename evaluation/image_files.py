"""Write generated images to one file of ADM's format or to PNGs, or discard them after the metrics."""

import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ConfigDict

from core.atomic import require_no_folder, write_bytes
from core.npz import Blocks, write_npz
from core.reading import DamagedFileError, read_text, sha256_of
from core.records import read_record, seal
from evaluation.chunks import Chunk
from evaluation.kept import Sha256, npy_of, parse_npy, read_kept, unless_damaged, write_kept

PLAN_NAME = ".plan"  # the file that names the evaluation of the images in a folder
_LONGEST_PLAN = 1000


def _plan_in(folder: Path) -> str | None:
    """Return the plan in a folder, or None if it has none. Raises DamagedFileError where it cannot be read."""
    try:
        return read_text(folder / PLAN_NAME, _LONGEST_PLAN)
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_prompts(path: Path, texts: Sequence[str], classes: NDArray[np.int64] | None) -> None:
    """Write the prompt of image i as line i, with its class where it is known; the setting ``prompts`` reads them."""
    of_class = [{}] * len(texts) if classes is None else [{"class": number} for number in classes.tolist()]
    lines = [json.dumps({"prompt": text, **more}) for text, more in zip(texts, of_class, strict=True)]
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


class ImageFiles(Protocol):
    """Writes images chunk by chunk, from several processes that share a file system."""

    def start(self, plan: str, is_main: bool) -> None:
        """Prepare for images of evaluation ``plan``, apart from those of others. Every process must call it."""
        ...

    def has(self, chunk: Chunk) -> bool:
        """Return whether the chunk's images exist unchanged, so that they need not be generated again."""
        ...

    def write(self, chunk: Chunk, images: NDArray[np.uint8]) -> None:
        """Write the images [B, H, W, C] of a chunk."""
        ...

    def finish(
        self, chunks: list[Chunk], classes: NDArray[np.int64] | None, texts: Sequence[str] | None = None
    ) -> None:
        """Finish when all chunks, with images of these classes and prompts, are written.

        Called on the main process only.
        """
        ...


class NoFiles:
    """Discards the images."""

    def start(self, plan: str, is_main: bool) -> None:
        """Do nothing."""

    def has(self, chunk: Chunk) -> bool:
        """Return True, since no file is missing."""
        return True

    def write(self, chunk: Chunk, images: NDArray[np.uint8]) -> None:
        """Do nothing."""

    def finish(
        self, chunks: list[Chunk], classes: NDArray[np.int64] | None, texts: Sequence[str] | None = None
    ) -> None:
        """Do nothing."""


class NpzFile:
    """An .npz file for ADM's evaluator: ``arr_0`` uint8 [num_images, H, W, C], and ``arr_1`` int64 [num_images].

    ``arr_1`` has the labels, if there are any. Finished chunks are stored in ``{path}.parts``, each with a record of
    its hash; a damaged one is generated again.
    """

    def __init__(self, path: str) -> None:
        if not path.endswith(".npz"):
            raise ValueError(f"evaluation.image_file.path is {path}, but it must end in .npz; name the file so.")
        self._path = Path(path)
        self._parts = self._path.with_name(self._path.name + ".parts")
        self._plan = ""

    def start(self, plan: str, is_main: bool) -> None:
        """Delete the parts of another evaluation. Raises ValueError where the file cannot be written."""
        self._plan = plan
        require_no_folder(self._path)
        if is_main and unless_damaged(lambda: _plan_in(self._parts)) != plan:
            rmtree(self._parts, ignore_errors=True)
            write_bytes(self._parts / PLAN_NAME, plan.encode())

    def _part(self, chunk: Chunk) -> Path:
        return self._parts / f"{chunk.first:08d}-{chunk.last:08d}.npy"

    def _identity(self, chunk: Chunk) -> dict[str, Any]:
        return {"plan": self._plan, "first": chunk.first, "last": chunk.last}

    def _read(self, chunk: Chunk) -> NDArray[np.uint8]:
        path = self._part(chunk)
        shape = (chunk.last - chunk.first, None, None, None)
        return parse_npy(read_kept(path, self._identity(chunk)), path, shape, np.uint8)

    def has(self, chunk: Chunk) -> bool:
        """Return whether the chunk's part exists and is sound."""
        return unless_damaged(lambda: self._read(chunk)) is not None

    def write(self, chunk: Chunk, images: NDArray[np.uint8]) -> None:
        """Write the part of one chunk."""
        write_kept(self._part(chunk), npy_of(images), self._identity(chunk))

    def finish(
        self, chunks: list[Chunk], classes: NDArray[np.int64] | None, texts: Sequence[str] | None = None
    ) -> None:
        """Join the parts, delete them, and write a ``.jsonl`` of the prompts beside it, if there are any.

        Raises ValueError where a part was damaged after it was written.
        """
        first = self._last_read(chunks[0])
        others = (self._last_read(chunk) for chunk in chunks[1:])
        images = Blocks((chunks[-1].last, *first.shape[1:]), np.dtype(np.uint8), itertools.chain([first], others))
        labels = {} if classes is None else {"arr_1": classes}
        write_npz(self._path, {"arr_0": images, **labels}, zip64=True)
        if texts is not None:
            write_prompts(self._path.with_suffix(".jsonl"), texts, classes)
        rmtree(self._parts)

    def _last_read(self, chunk: Chunk) -> NDArray[np.uint8]:
        try:
            return self._read(chunk)
        except (DamagedFileError, FileNotFoundError) as error:
            reason = str(error).rstrip(".")
            raise DamagedFileError(f"{reason}; give the same command again, which makes these images again.") from None


@dataclass(frozen=True)
class _Pictures:
    """The record of a chunk's PNGs."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    plan: str
    first: int
    last: int
    sha256: tuple[Sha256, ...]


class PngFiles:
    """A folder of ``{index:06d}.png``, for images of 1 or 3 channels.

    A hidden record of each chunk has the hashes of its pictures; if one is damaged, the chunk is generated again.
    """

    def __init__(self, path: str) -> None:
        self._folder = Path(path)
        self._plan = ""

    def start(self, plan: str, is_main: bool) -> None:
        """Raise ValueError where the folder has pictures of another evaluation."""
        self._plan, another = plan, f"name another folder than {self._folder} by evaluation.image_file.path."
        try:
            found = _plan_in(self._folder)
        except DamagedFileError as error:
            raise DamagedFileError(
                f"{str(error).rstrip('.')}, so its images are of no known evaluation; {another}"
            ) from None
        if found != plan and any(self._folder.glob("*.png")):
            raise ValueError(
                f"{self._folder} holds other images (of evaluation {str(found)[:8]}, this is {plan[:8]}); {another}"
            )
        if is_main:
            write_bytes(self._folder / PLAN_NAME, plan.encode())

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}.png"

    def _record(self, chunk: Chunk) -> Path:
        return self._folder / f".{chunk.first:08d}-{chunk.last:08d}.json"

    def has(self, chunk: Chunk) -> bool:
        """Return whether all pictures of the chunk exist and are sound."""
        return unless_damaged(lambda: self._require(chunk)) is not None

    def _require(self, chunk: Chunk) -> bool:
        record, paths = read_record(self._record(chunk), _Pictures), [self._path(int(index)) for index in chunk.indices]
        said = (record.plan, record.first, record.last, len(record.sha256))
        if said != (self._plan, chunk.first, chunk.last, len(paths)):
            raise DamagedFileError(f"{self._record(chunk)} is the record of other images.")
        for path, expected in zip(paths, record.sha256, strict=True):
            if (found := sha256_of(path)) != expected:
                raise DamagedFileError(f"{path} is damaged: it has sha256 {found}, but its record says {expected}.")
        return True

    def write(self, chunk: Chunk, images: NDArray[np.uint8]) -> None:
        """Write one file an image, then their record."""
        if images.shape[3] not in (1, 3):
            raise ValueError(
                f"The images have {images.shape[3]} channels, but a PNG has 1 or 3; use evaluation/image_file=npz."
            )
        hashes = []
        for index, image in zip(chunk.indices, images, strict=True):
            content = io.BytesIO()
            Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(content, "PNG")
            write_bytes(self._path(int(index)), content.getvalue())
            hashes.append(sha256(content.getvalue()).hexdigest())
        record = asdict(_Pictures(self._plan, chunk.first, chunk.last, tuple(hashes)))
        write_bytes(self._record(chunk), json.dumps(seal(record)).encode())

    def finish(
        self, chunks: list[Chunk], classes: NDArray[np.int64] | None, texts: Sequence[str] | None = None
    ) -> None:
        """Write ``prompts.jsonl``, if there are any; the pictures are already written."""
        if texts is not None:
            write_prompts(self._folder / "prompts.jsonl", texts, classes)
