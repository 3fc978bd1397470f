"""Recycle the memory of large arrays: the system takes longer to give a new page than a program to fill it."""

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

_ALIGNMENT = 64  # bytes, of a cache line
_MOST_KEPT = 16  # blocks that are free


class _Block(NamedTuple):
    memory: NDArray[np.uint8]
    address: int  # to ask numpy takes microseconds


class Buffers:
    """Gives uninitialized arrays. Memory is used again when nothing refers to the array or a view or tensor of it."""

    def __init__(self) -> None:
        self._free: deque[_Block] = deque(maxlen=_MOST_KEPT)  # append and remove are atomic

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array whose values are undefined."""
        kind = np.dtype(dtype)
        num_bytes = math.prod(shape) * kind.itemsize
        return np.asarray(_Lent(self._taken(num_bytes), self._free, shape, kind))

    def _taken(self, num_bytes: int) -> _Block:
        """Return the memory of exactly this size that was freed last, since it may still be cached, or new memory."""
        for _ in range(len(self._free)):
            try:
                block = self._free.pop()
            except IndexError:  # another thread took it
                break
            if len(block.memory) == num_bytes:
                return block
            self._free.appendleft(block)
        whole = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        start = -whole.ctypes.data % _ALIGNMENT
        return _Block(whole[start : start + num_bytes], whole.ctypes.data + start)


class _Lent:
    """The owner of an array's memory, by numpy's protocol. Every view of the array keeps it alive."""

    def __init__(self, block: _Block, free: deque[_Block], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._block, self._free = block, free
        address = (block.address, False)
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": address}

    def __del__(self) -> None:
        self._free.append(self._block)
