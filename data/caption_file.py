"""Write ``captions.npz``, the captions of all rows of a folder of shards, and read single rows of it from the file.

It is an index of its own: captions may be as large as the latents' index, and training without text never reads them.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.npz import Blocks, Place, places_in, write_npz
from core.reading import DamagedFileError, open_regular, sha256_of
from data.caption_tokens import CaptionTokens, TokenIds, write_empty_caption
from data.manifest import CAPTIONS_NAME, CaptionsSpec, Manifest, TextSpec, TokensSpec
from data.mapped_file import MappedFile, fill_by_descriptor, fill_rows
from data.sources import MAX_CAPTION, Prepared
from data.text_encoders import TextEncoder

_PIECE = 2**20  # numbers that are checked at a time
_MOST_BYTES = 4 * MAX_CAPTION  # of one caption in UTF-8
_MOST_OF_SHARD = 2**24  # characters of captions, so that a sidecar is small enough to be read
_ARRAYS = ("first", "end", "text")
_OF_TOKENS = ("token_id", "num_tokens")

ShardCaptions = Sequence[Sequence[str]]  # the captions of each row of a shard


def captions_to_store(path: Path, examples: Sequence[Prepared], text: TextSpec | None) -> list[list[str]] | None:
    """Return the captions of each example of the shard ``path``, or None where there are none.

    Raises ValueError where only some examples have captions, none has although a ``text`` encoder is given, or they are
    too large for a sidecar.
    """
    require_all_or_none([(example.source_id, bool(example.captions)) for example in examples])
    captions = [list(example.captions) for example in examples]
    if text is not None and examples and not any(captions):
        raise ValueError(
            f"A text encoder is given, but {examples[0].source_id} has no caption; set data/text_encoder=none, or give "
            "captions by the source or data/captions."
        )
    if (size := sum(map(len, _each([captions])))) > _MOST_OF_SHARD:
        raise ValueError(
            f"The captions of {path} have {size} characters, but those of a shard may have {_MOST_OF_SHARD}; set a "
            "smaller data.samples_per_shard."
        )
    return captions if any(captions) else None


def require_all_or_none(images: Sequence[tuple[str, bool]]) -> None:
    """Raise ValueError, naming one of each, where some of the images have captions and others have none."""
    with_, without = (next((name for name, has in images if has is wanted), None) for wanted in (True, False))
    if with_ is not None and without is not None:
        raise ValueError(f"{with_} has a caption, but {without} has none; give captions to all images or to none.")


def write_captions(folder: Path, shards: Sequence[ShardCaptions], encoder: TextEncoder | None = None) -> CaptionsSpec:
    """Write the captions of each row of each shard; equal captions give equal bytes.

    ``first`` has the number of each row's first caption [num_samples], ``end`` the end of each caption in bytes
    [count], and ``text`` all captions one after the other, in UTF-8. With an ``encoder``, ``token_id`` [count, M] and
    ``num_tokens`` [count] follow, and the empty caption's embedding is written to a file of its own.
    """
    counts = [len(row) for shard in shards for row in shard]
    sizes = np.array([len(caption.encode()) for caption in _each(shards)], dtype=np.int64)
    assert min(counts) > 0, "each row has a caption"
    assert sizes.min() > 0, "no caption is empty"
    ends = np.cumsum(sizes)
    text = Blocks((int(ends[-1]),), np.dtype(np.uint8), map(_bytes_of, shards))
    first = np.cumsum([0, *counts[:-1]], dtype=np.int64)
    path = folder / CAPTIONS_NAME
    ids = None if encoder is None else TokenIds(_each(shards), len(sizes), encoder)
    write_npz(path, {"first": first, "end": ends, "text": text, **({} if ids is None else ids.arrays())})
    tokens = None
    if ids is not None and encoder is not None:
        tokens = TokensSpec(encoder.spec(), ids.num_truncated, write_empty_caption(folder, encoder))
    return CaptionsSpec(sha256_of(path), path.stat().st_size, len(sizes), tokens)


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
        tokens = manifest.captions.tokens
        wanted = (*_ARRAYS, *(() if tokens is None else _OF_TOKENS))
        places = places_in(lambda start, size: self._bytes(start, size).tobytes(), len(mapped), name, wanted)
        self._firsts, self._ends, self._text = (places[array] for array in _ARRAYS)
        self._require(self._firsts, "first", np.int64, (self._num_rows,))
        self._require(self._ends, "end", np.int64, (self._count,))
        self._require(self._text, "text", np.uint8, self._text.header.shape[:1])
        self._ids, self._lengths = (places.get(array) for array in _OF_TOKENS)
        if tokens is not None:
            self._require(places["token_id"], "token_id", np.int32, (self._count, tokens.encoder.length))
            self._require(places["num_tokens"], "num_tokens", np.int32, (self._count,))
        num_bytes = self._text.header.shape[0]
        self._require_rising(self._firsts, "first", before=-1, highest=self._count - 1, most=self._count)
        self._require_rising(self._ends, "end", before=0, highest=num_bytes, most=_MOST_BYTES)
        begin, end = self._values(self._firsts, 0, 1)[0], self._values(self._ends, self._count - 1, self._count)[0]
        if (begin, end) != (0, num_bytes):
            raise DamagedFileError(
                f"{name} is damaged: first begins with {begin}, not 0, or end ends with {end}, not {num_bytes}."
            )

    def of_rows(self, start: int, stop: int) -> list[list[str]]:
        """Return the captions of the rows start .. stop - 1. Raises DamagedFileError where one is not in UTF-8."""
        if start == stop:
            return []
        firsts = self._first_captions(start, stop)
        from_caption = firsts[0]
        ends = self._values(self._ends, max(from_caption - 1, 0), firsts[-1]).tolist()
        bounds = ends if from_caption else [0, *ends]
        text = self._bytes(self._text.offset + bounds[0], bounds[-1] - bounds[0]).tobytes()
        captions = [
            self._decoded(text[begin - bounds[0] : end - bounds[0]], from_caption + number)
            for number, (begin, end) in enumerate(pairwise(bounds))
        ]
        return [captions[begin - from_caption : end - from_caption] for begin, end in pairwise(firsts)]

    def tokens_of_rows(self, start: int, stop: int) -> list[CaptionTokens]:
        """Return token ids and mask of the captions of the rows start .. stop - 1.

        Raises DamagedFileError where an id is below zero, or where no token, or more than there are, is not padding.
        """
        assert self._ids is not None, "these shards have no token ids"
        assert self._lengths is not None
        if start == stop:
            return []
        firsts = self._first_captions(start, stop)
        ids = self._values(self._ids, firsts[0], firsts[-1])
        lengths = self._values(self._lengths, firsts[0], firsts[-1])
        if ids.min() < 0 or lengths.min() < 1 or lengths.max() > ids.shape[1]:
            raise DamagedFileError(
                f"{self._name} is damaged: the captions of the rows {start} to {stop - 1} have token ids from "
                f"{ids.min()} on and {lengths.min()} to {lengths.max()} tokens, of {ids.shape[1]}."
            )
        mask = np.arange(ids.shape[1]) < lengths[:, np.newaxis]
        parts = [slice(begin - firsts[0], end - firsts[0]) for begin, end in pairwise(firsts)]
        return [CaptionTokens(ids[part], mask[part]) for part in parts]

    def numbers_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of each row's first caption [B], and that behind its last [B]."""
        last = self._num_rows - 1
        if last == 0:
            return np.zeros(len(rows), np.int64), np.full(len(rows), self._count, np.int64)
        pairs = self._gathered(self._firsts, np.minimum(rows, last - 1), width=2)  # of a row and the next
        is_last = rows == last
        begin, end = np.where(is_last, pairs[:, 1], pairs[:, 0]), np.where(is_last, self._count, pairs[:, 1])
        if (begin < 0).any() or (begin >= end).any() or (end > self._count).any():
            raise DamagedFileError(f"{self._name} was changed while this job ran.")
        return begin, end

    def tokens_at(self, numbers: NDArray[np.int64]) -> CaptionTokens:
        """Return token ids and mask [B, M] of the captions with these numbers. Raises as `tokens_of_rows` does."""
        assert self._ids is not None, "these shards have no token ids"
        ids = self._gathered(self._ids, numbers)
        if ids.min(initial=0) < 0:
            raise DamagedFileError(f"{self._name} is damaged: it has token ids from {ids.min()} on.")
        return CaptionTokens(ids, self.mask_at(numbers))

    def mask_at(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return the mask [B, M] of the captions with these numbers. Raises as `tokens_of_rows` does."""
        assert self._ids is not None, "these shards have no token ids"
        assert self._lengths is not None
        lengths, length = self._gathered(self._lengths, numbers), self._ids.header.shape[1]  # [B, 1]
        if lengths.min(initial=1) < 1 or lengths.max(initial=1) > length:
            raise DamagedFileError(
                f"{self._name} is damaged: captions have {lengths.min()} to {lengths.max()} tokens, of {length}."
            )
        return np.arange(length) < lengths

    def _gathered(self, place: Place, numbers: NDArray[np.int64], width: int = 1) -> NDArray[Any]:
        """Return the rows ``numbers`` [B] of a matrix, [B, M], or ``width`` values of a vector from each on."""
        of_one, dtype = place.header.shape[1:], place.header.dtype
        values = np.empty((len(numbers), *(of_one or (width,))), dtype)
        offsets = place.offset + dtype.itemsize * math.prod(of_one) * numbers
        descriptors = np.full(len(numbers), self._mapped.descriptor, np.int32)
        filled = fill_by_descriptor(descriptors, offsets, values)
        if fill_rows([self._mapped] * len(numbers), offsets, values, filled) < len(numbers):
            raise DamagedFileError(f"{self._name} was cut while this job ran.")
        return values

    def _first_captions(self, start: int, stop: int) -> list[int]:
        """Return the number of the first caption of each of the rows start .. stop; that of no row is the count."""
        firsts: list[int] = self._values(self._firsts, start, min(stop + 1, self._num_rows)).tolist()
        return [*firsts, self._count] if stop == self._num_rows else firsts

    def _decoded(self, content: bytes, number: int) -> str:
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise DamagedFileError(f"{self._name} is damaged: caption {number} is not text in UTF-8.") from None

    def _require(self, place: Place, array: str, dtype: type, shape: tuple[int, ...]) -> None:
        header = place.header
        if (header.dtype, header.shape) != (np.dtype(dtype), shape):
            raise DamagedFileError(
                f"{self._name} is damaged: {array} is {header.dtype}{list(header.shape)}, not "
                f"{np.dtype(dtype)}{list(shape)}."
            )

    def _require_rising(self, place: Place, array: str, before: int, highest: int, most: int) -> None:
        """Raise DamagedFileError unless numbers rise by 1 to ``most`` each, from the one ``before`` to ``highest``."""
        length = place.header.shape[0]
        for begin in range(0, length, _PIECE):
            numbers = self._values(place, begin, min(begin + _PIECE, length))
            steps = np.diff(numbers, prepend=before)
            if numbers.min() < 0 or numbers.max() > highest or steps.min() < 1 or steps.max() > most:
                raise DamagedFileError(
                    f"{self._name} is damaged: {array} does not rise by 1 to {most} each, up to {highest}."
                )
            before = int(numbers[-1])

    def _values(self, place: Place, start: int, stop: int) -> NDArray[Any]:
        """Return the values start .. stop - 1 of an array."""
        of_one = place.header.shape[1:]
        size = place.header.dtype.itemsize * math.prod(of_one)
        values = self._bytes(place.offset + size * start, size * (stop - start))
        return values.view(place.header.dtype).reshape(stop - start, *of_one)

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
