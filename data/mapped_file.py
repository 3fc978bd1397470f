"""Map a file, and read it by position too: a process that maps many gigabytes spends most of a read on page faults."""

import mmap
import os
from typing import Any

from numpy.typing import NDArray


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

    def copy_to(self, out: NDArray[Any], offset: int) -> int:
        """Fill a contiguous array with the bytes at ``offset``; return their number, smaller where the file was cut."""
        if self._descriptor is not None:
            return os.preadv(self._descriptor, [out.data], offset)
        out.data.cast("B")[:] = self[offset : offset + out.nbytes]
        return out.nbytes

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
