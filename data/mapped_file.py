"""Map a file, and read it by position too: a process that maps many gigabytes spends most of a read on page faults."""

import math
import mmap
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.deferred import Deferred
from core.samples import Reads


class MappedFile(mmap.mmap):
    """A file mapped read-only. It keeps the descriptor's lock while it exists."""

    _descriptor: int | None = None

    @classmethod
    def of(cls, descriptor: int, by_position: bool) -> "MappedFile":
        """Map an open file. ``by_position`` keeps a second descriptor, by which it is read; else the mapping is."""
        mapped = cls(descriptor, 0, access=mmap.ACCESS_READ)
        if by_position:
            mapped._descriptor = os.dup(descriptor)
        return mapped

    @property
    def descriptor(self) -> int:
        """Return the descriptor by which the file is read, or -1 where the mapping is read."""
        return -1 if self._descriptor is None else self._descriptor

    def copy_to(self, out: NDArray[Any], offset: int) -> int:
        """Fill a contiguous array with the bytes at ``offset``; return their number, smaller where the file was cut."""
        if self._descriptor is not None:
            return os.preadv(self._descriptor, [out.data], offset)
        out.data.cast("B")[:] = self[offset : offset + out.nbytes]
        return out.nbytes

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def fill_by_descriptor(descriptors: NDArray[np.int32], offsets: NDArray[np.int64], out: NDArray[Any]) -> int:
    """Fill each row of a contiguous array from one descriptor at one offset, without the GIL.

    Return the number of rows that were filled: 0 where a descriptor is negative, and before a compiled function pays.
    """
    assert out.flags.c_contiguous, "a copy would be filled"
    if len(descriptors) and descriptors.min() >= 0 and (read_rows := FAST_READS.get(len(descriptors))):
        return read_rows(descriptors, offsets, out.reshape(len(out), math.prod(out.shape[1:])).view(np.uint8))
    return 0


def compiled_reads(descriptors: NDArray[np.int32], offsets: NDArray[np.int64], files: object) -> Reads | None:
    """Return the compiled function by which rows are read, or None where a descriptor is negative or Python reads.

    ``files`` has the files of the descriptors, and keeps them open.
    """
    if (read_rows := FAST_READS.get(0)) and not len(descriptors[descriptors < 0]):
        return Reads(read_rows, descriptors, offsets, files)
    return None


def fill_rows(files: Sequence[MappedFile], offsets: NDArray[np.int64], out: NDArray[Any], filled: int = 0) -> int:
    """Fill each row of a contiguous array after the first ``filled`` from one file at one offset.

    Return the number of rows that are filled then, which is that before the first row where the file was cut.
    """
    while filled < len(files) and files[filled].copy_to(out[filled], int(offsets[filled])) == out[filled].nbytes:
        filled += 1
    return filled


def _load_reads() -> Callable[..., int]:
    function: Callable[..., int] = import_module("core.compiled_reads").read_rows
    return function


FAST_READS = Deferred("reads", _load_reads, worth=2**15, without="slower")  # a microsecond each without
