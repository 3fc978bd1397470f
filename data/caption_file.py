"""Write ``captions.npz``, the captions of all rows of a folder of shards, and read single rows of it from the file.

It is an index of its own: captions may be as large as the latents' index, and training without text never reads them.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.npz import Blocks, Place, places_in, write_npz
from core.reading import DamagedFileError, open_regular, sha256_of
from data.manifest import CAPTIONS_NAME, CaptionsSpec, Manifest
from data.mapped_file import MappedFile
from data.sources import MAX_CAPTION

_PIECE = 2**20  # numbers that are checked at a time
_MOST_BYTES = 4 * MAX_CAPTION  # of one caption in UTF-8
_ARRAYS = ("first", "end", "text")

ShardCaptions = Sequence[Sequence[str]]  # the captions of each row of a shard


def write_captions(folder: Path, shards: Sequence[ShardCaptions]) -> CaptionsSpec:
    """Write the captions of each row of each shard; equal captions give equal bytes.

    ``first`` has the number of each row's first caption [num_samples], ``end`` the end of each caption in bytes
    [count], and ``text`` all captions one after the other, in UTF-8.
    """
    counts = [len(row) for shard in shards for row in shard]
    sizes = np.array([len(caption.encode()) for caption in _each(shards)], dtype=np.int64)
    assert min(counts) > 0, "each row has a caption"
    assert sizes.min() > 0, "no caption is empty"
    ends = np.cumsum(sizes)
    text = Blocks((int(ends[-1]),), np.dtype(np.uint8), map(_bytes_of, shards))
    first = np.cumsum([0, *counts[:-1]], dtype=np.int64)
    path = folder / CAPTIONS_NAME
    write_npz(path, {"first": first, "end": ends, "text": text})
    return CaptionsSpec(sha256=sha256_of(path), bytes=path.stat().st_size, count=len(sizes))


def _each(shards: Iterable[ShardCaptions]) -> Iterator[str]:
    return (caption for shard in shards for row in shard for caption in row)


def _bytes_of(shard: ShardCaptions) -> NDArray[np.uint8]:
    return np.frombuffer("".join(_each([shard])).encode(), dtype=np.uint8)


class CaptionFile:
    """The captions of rows, read from a mapped ``captions.npz`` on demand; several threads may read at once.

    ``name`` is that of the file in errors. Raises DamagedFileError where the file contradicts the manifest or itself.
    """

    def __init__(self, mapped: MappedFile, manifest: Manifest, name: str) -> None:
        assert manifest.captions is not None, "these shards have no captions"
        self._mapped, self._name = mapped, name
        self._count, self._num_rows = manifest.captions.count, manifest.num_samples
        places = places_in(lambda start, size: self._bytes(start, size).tobytes(), len(mapped), name, _ARRAYS)
        self._firsts, self._ends, self._text = (places[array] for array in _ARRAYS)
        self._require(self._firsts, "first", np.int64, self._num_rows)
        self._require(self._ends, "end", np.int64, self._count)
        self._require(self._text, "text", np.uint8, None)
        num_bytes = self._text.header.shape[0]
        self._require_rising(self._firsts, "first", before=-1, highest=self._count - 1, most=self._count)
        self._require_rising(self._ends, "end", before=0, highest=num_bytes, most=_MOST_BYTES)
        begin, end = self._numbers(self._firsts, 0, 1)[0], self._numbers(self._ends, self._count - 1, self._count)[0]
        if (begin, end) != (0, num_bytes):
            raise DamagedFileError(
                f"{name} is damaged: first begins with {begin}, not 0, or end ends with {end}, not {num_bytes}."
            )

    def of_rows(self, start: int, stop: int) -> list[list[str]]:
        """Return the captions of the rows start .. stop - 1. Raises DamagedFileError where one is not in UTF-8."""
        if start == stop:
            return []
        firsts = self._numbers(self._firsts, start, min(stop + 1, self._num_rows)).tolist()
        if stop == self._num_rows:
            firsts.append(self._count)
        from_caption = firsts[0]
        ends = self._numbers(self._ends, max(from_caption - 1, 0), firsts[-1]).tolist()
        bounds = ends if from_caption else [0, *ends]
        text = self._bytes(self._text.offset + bounds[0], bounds[-1] - bounds[0]).tobytes()
        captions = [
            self._decoded(text[begin - bounds[0] : end - bounds[0]], from_caption + number)
            for number, (begin, end) in enumerate(pairwise(bounds))
        ]
        return [captions[begin - from_caption : end - from_caption] for begin, end in pairwise(firsts)]

    def _decoded(self, content: bytes, number: int) -> str:
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise DamagedFileError(f"{self._name} is damaged: caption {number} is not text in UTF-8.") from None

    def _require(self, place: Place, array: str, dtype: type, length: int | None) -> None:
        header = place.header
        if header.dtype != dtype or len(header.shape) != 1 or length not in (None, header.shape[0]):
            expected = f"{np.dtype(dtype)}[{'any' if length is None else length}]"
            raise DamagedFileError(
                f"{self._name} is damaged: {array} is {header.dtype}{list(header.shape)}, not {expected}."
            )

    def _require_rising(self, place: Place, array: str, before: int, highest: int, most: int) -> None:
        """Raise DamagedFileError unless numbers rise by 1 to ``most`` each, from the one ``before`` to ``highest``."""
        length = place.header.shape[0]
        for begin in range(0, length, _PIECE):
            numbers = self._numbers(place, begin, min(begin + _PIECE, length))
            steps = np.diff(numbers, prepend=before)
            if numbers.min() < 0 or numbers.max() > highest or steps.min() < 1 or steps.max() > most:
                raise DamagedFileError(
                    f"{self._name} is damaged: {array} does not rise by 1 to {most} each, up to {highest}."
                )
            before = int(numbers[-1])

    def _numbers(self, place: Place, start: int, stop: int) -> NDArray[np.int64]:
        """Return the numbers start .. stop - 1 of an array of int64."""
        return self._bytes(place.offset + 8 * start, 8 * (stop - start)).view("<i8")

    def _bytes(self, start: int, size: int) -> NDArray[np.uint8]:
        """Return bytes of the file, fewer behind its end. Raises DamagedFileError where it was cut meanwhile."""
        found = np.empty(max(0, min(size, len(self._mapped) - start)), dtype=np.uint8)
        if len(found) and self._mapped.copy_to(found, start) < len(found):
            raise DamagedFileError(f"{self._name} was cut while this job ran.")
        return found


def open_captions(path: Path, manifest: Manifest) -> CaptionFile:
    """Open ``captions.npz``. Raises OSError as `open` does, and DamagedFileError where it is not the manifest's."""
    spec = manifest.captions
    assert spec is not None, "these shards have no captions"
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) != spec.bytes:
            raise DamagedFileError(f"{path} has {size} bytes, not {spec.bytes}.")
        if (found := sha256_of(path)) != spec.sha256:
            raise DamagedFileError(f"{path} has sha256 {found}, not {spec.sha256}.")
        return CaptionFile(MappedFile.of(file.fileno(), by_position=True), manifest, str(path))
