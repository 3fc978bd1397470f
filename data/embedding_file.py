"""Write, locate and check the embeddings of a shard's captions, in a file beside it.

Rows have different numbers of captions, so their embeddings are no members of fixed stride of the tar. The file is an
``.npz`` with ``tokens`` float16 [captions of the shard, M, D] and ``pooled`` float16 [captions of the shard, P]. The
mask follows from ``num_tokens`` in ``captions.npz``.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from core.npz import Blocks, places_in, write_npz
from core.reading import DamagedFileError, open_regular, sha256_of
from data.caption_tokens import one_thread
from data.manifest import ShardEntry, TextSpec
from data.mapped_file import MappedFile
from data.text_encoders import TextEncoder

_TOGETHER = 64  # captions per call of the encoder, all of one shard, so that no setting of a job changes their rounding
_PIECE = 2**22  # values that are checked at a time
_FLOAT16 = np.dtype(np.float16)


class CaptionEmbeddings(NamedTuple):
    """Captions as a network is conditioned on them."""

    tokens: NDArray[np.float16]  # [B, M, D]
    mask: NDArray[np.bool_]  # [B, M], False at padding
    pooled: NDArray[np.float16]  # [B, P]

    @classmethod
    def empty(cls, count: int, spec: TextSpec) -> "CaptionEmbeddings":
        """Return arrays for the embeddings of as many captions, whose values are undefined."""
        shapes = ((spec.length, spec.dim), (spec.length,), (spec.pooled_dim,))
        dtypes = (np.float16, np.bool_, np.float16)
        return cls(*(np.empty((count, *shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))


class NamedCaption(NamedTuple):
    """A caption and the name of its image in the source, for errors."""

    text: str
    source_id: str


class EmbeddingOffsets(NamedTuple):
    """The offsets in bytes of the first caption's values in a file."""

    tokens: int
    pooled: int


def write_embeddings(
    path: Path,
    captions: Sequence[NamedCaption],
    encoder: TextEncoder,
    device: torch.device,
    done: Callable[[int], object],
) -> ShardEntry:
    """Write the embeddings of a shard's captions by an encoder on its ``device``; return the file's record.

    ``done`` is called with the number of captions after each call of the encoder. On the CPU one thread computes, so
    that the bytes do not depend on the number of processes that share its cores. Raises ValueError for values that
    float16 cannot hold.
    """
    spec = encoder.spec()
    made = _Made(captions, encoder, device, done)
    with one_thread() if device.type == "cpu" else nullcontext():
        write_npz(
            path,
            {
                "tokens": Blocks((len(captions), spec.length, spec.dim), _FLOAT16, made.tokens()),
                "pooled": Blocks((len(captions), spec.pooled_dim), _FLOAT16, made.pooled),
            },
        )
    return ShardEntry(path.name, len(captions), path.stat().st_size, sha256_of(path))


class _Made:
    """The embeddings of captions, made while `write_npz` writes the tokens, so that few of these are in memory."""

    def __init__(
        self,
        captions: Sequence[NamedCaption],
        encoder: TextEncoder,
        device: torch.device,
        done: Callable[[int], object],
    ) -> None:
        self._captions, self._encoder, self._device, self._done = captions, encoder, device, done
        self.pooled: list[NDArray[np.float16]] = []  # of each call of the encoder, to be written after the tokens

    def tokens(self) -> Iterator[NDArray[np.float16]]:
        for first in range(0, len(self._captions), _TOGETHER):
            together = self._captions[first : first + _TOGETHER]
            ids, mask, _ = self._encoder.tokenize([caption.text for caption in together])
            found = self._encoder.encode(
                torch.from_numpy(ids).to(self._device), torch.from_numpy(mask).to(self._device)
            )
            tokens, pooled = found.tokens.half().cpu().numpy(), found.pooled.half().cpu().numpy()
            self._require_finite(together, tokens, pooled)
            self.pooled.append(pooled)
            yield tokens
            self._done(len(together))

    def _require_finite(self, captions: Sequence[NamedCaption], *arrays: NDArray[np.float16]) -> None:
        for array in arrays:
            finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
            if not finite.all():
                bad = captions[int(np.flatnonzero(~finite)[0])]
                raise ValueError(
                    f"The text encoder {self._encoder.spec().name} gives values of the caption {bad.text[:80]!r} of "
                    f"{bad.source_id} that float16 cannot hold, but they must be finite and at most 65504; leave "
                    "that image out, or set text_embeddings=false."
                )


def embedding_offsets(mapped: MappedFile, entry: ShardEntry, spec: TextSpec, name: str) -> EmbeddingOffsets:
    """Return where the values of a shard's file lie, after checking its headers; errors call the file ``name``.

    Raises DamagedFileError where the arrays do not have the encoder's shapes, for as many captions as ``entry`` says.
    """
    wanted = {"tokens": (entry.count, spec.length, spec.dim), "pooled": (entry.count, spec.pooled_dim)}
    places = places_in(lambda start, size: mapped[start : start + size], len(mapped), name, tuple(wanted))
    for array, shape in wanted.items():
        header = places[array].header
        if (header.dtype, header.shape) != (_FLOAT16, shape):
            raise DamagedFileError(
                f"{name} is damaged: {array} is {header.dtype}{list(header.shape)}, not {_FLOAT16}{list(shape)}."
            )
    return EmbeddingOffsets(places["tokens"].offset, places["pooled"].offset)


def is_whole(path: Path, entry: ShardEntry) -> bool:
    """Return whether a file is a regular one with the size and the hash of its record."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        return size == entry.bytes and sha256_of(path) == entry.sha256
    except (OSError, ValueError):
        return False


def require_embeddings(path: Path, entry: ShardEntry, spec: TextSpec) -> None:
    """Read a whole file. Raises OSError as `open` does, and DamagedFileError where it is not that of the manifest."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) != entry.bytes:
            raise DamagedFileError(f"{path} has {size} bytes, not {entry.bytes}.")
        if (found := sha256_of(path)) != entry.sha256:
            raise DamagedFileError(f"{path} has sha256 {found}, not {entry.sha256}.")
        mapped = MappedFile.of(file.fileno(), by_position=True)
    offsets = embedding_offsets(mapped, entry, spec, str(path))
    for offset, of_one in zip(offsets, (spec.length * spec.dim, spec.pooled_dim), strict=True):
        for first in range(0, entry.count * of_one, _PIECE):
            values = np.empty(min(_PIECE, entry.count * of_one - first), dtype=np.float16)
            if mapped.copy_to(values, offset + 2 * first) < values.nbytes:
                raise DamagedFileError(f"{path} was cut while this job ran.")
            if not np.isfinite(values).all():
                raise DamagedFileError(f"{path} has {int((~np.isfinite(values)).sum())} values that are not finite.")
