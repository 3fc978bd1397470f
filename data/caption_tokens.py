"""Compute what shards store for a text encoder: token ids of captions, and the embedding of the empty caption."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from core.npz import Blocks, read_npz, write_npz
from core.reading import DamagedFileError, sha256_of
from data.manifest import EMPTY_CAPTION_NAME, TextSpec
from data.text_encoders import TextEncoder

_TOGETHER = 1024  # captions that are tokenized at a time


class CaptionTokens(NamedTuple):
    """Captions as a text encoder takes them."""

    ids: NDArray[np.int32]  # [n, M], padded
    mask: NDArray[np.bool_]  # [n, M], False at padding


class EmptyCaption(NamedTuple):
    """The empty caption as a network is conditioned on it, which takes the place of dropped captions."""

    tokens: NDArray[np.float16]  # [M, D]
    mask: NDArray[np.bool_]  # [M], False at padding
    pooled: NDArray[np.float16]  # [P]


class TokenIds:
    """The token ids of captions, made while `write_npz` writes them, so that few are in memory."""

    def __init__(self, captions: Iterable[str], count: int, encoder: TextEncoder) -> None:
        self._captions, self._count, self._encoder = captions, count, encoder
        self._lengths: list[NDArray[np.int32]] = []
        self.num_truncated = 0  # captions that are longer than the encoder's length, once all are written

    def arrays(self) -> dict[str, Blocks]:
        """Return ``token_id`` [count, M] and, to be written after it, ``num_tokens`` [count] without padding."""
        int32 = np.dtype(np.int32)
        return {
            "token_id": Blocks((self._count, self._encoder.spec().length), int32, self._ids()),
            "num_tokens": Blocks((self._count,), int32, self._num_tokens()),
        }

    def _ids(self) -> Iterator[NDArray[np.int32]]:
        captions = iter(self._captions)
        while together := list(islice(captions, _TOGETHER)):
            found = self._encoder.tokenize(together)
            lengths = found.mask.sum(axis=1, dtype=np.int32)
            assert (found.mask == (np.arange(found.mask.shape[1]) < lengths[:, np.newaxis])).all(), "padding is last"
            self._lengths.append(lengths)
            self.num_truncated += found.num_truncated
            yield found.ids

    def _num_tokens(self) -> Iterator[NDArray[np.int32]]:
        yield from self._lengths


def write_empty_caption(folder: Path, encoder: TextEncoder) -> str:
    """Write ``empty_caption.npz`` and return its SHA-256. Raises ValueError for values that float16 cannot hold.

    It is computed on the CPU by one thread, so that its bytes depend neither on the number of processes nor on
    the device that the images are encoded on.
    """
    ids, mask, _ = encoder.tokenize([""])
    encoder.to(torch.device("cpu"))
    with one_thread():
        found = encoder.encode(torch.from_numpy(ids), torch.from_numpy(mask))
    arrays = {
        "tokens": found.tokens[0].half().numpy(),
        "mask": found.mask[0].numpy(),
        "pooled": found.pooled[0].half().numpy(),
    }
    for name in ("tokens", "pooled"):
        if not np.isfinite(arrays[name]).all():
            raise ValueError(
                f"The text encoder {encoder.spec().name} gives {name} of the empty caption that float16 cannot hold, "
                "but they must be finite and at most 65504; choose another encoder."
            )
    write_npz(folder / EMPTY_CAPTION_NAME, arrays)
    return sha256_of(folder / EMPTY_CAPTION_NAME)


def read_empty_caption(content: bytes, spec: TextSpec, name: str) -> EmptyCaption:
    """Return the arrays of ``empty_caption.npz``, which has this content; errors call it ``name``.

    Raises DamagedFileError where they do not have the shapes of the encoder, or are not finite.
    """
    arrays = read_npz(content, name, EmptyCaption._fields)
    wanted = {
        "tokens": (np.dtype(np.float16), (spec.length, spec.dim)),
        "mask": (np.dtype(np.bool_), (spec.length,)),
        "pooled": (np.dtype(np.float16), (spec.pooled_dim,)),
    }
    for array, (dtype, shape) in wanted.items():
        if (arrays[array].dtype, arrays[array].shape) != (dtype, shape):
            raise DamagedFileError(
                f"{name} is damaged: {array} is {arrays[array].dtype}{list(arrays[array].shape)}, not "
                f"{dtype}{list(shape)}."
            )
        if dtype != np.bool_ and not np.isfinite(arrays[array]).all():
            raise DamagedFileError(f"{name} is damaged: {array} has values that are not finite.")
    return EmptyCaption(**arrays)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread on the CPU, so that sums are always added in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
