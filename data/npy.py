"""The header of a ``.npy`` file, read without evaluating it: numpy's own reader takes it for a Python expression."""

import re
from typing import Any, NamedTuple

import numpy as np

from data.reading import DamagedFileError

LONGEST_HEADER = 2**10  # bytes; numpy's are 128 for arrays of our formats
_START = re.compile(rb"\x93NUMPY\x01\x00(..)", re.DOTALL)
_HEADER = re.compile(
    rb"\{'descr': '([<>|][biufUS][1-9]\d{0,8})', 'fortran_order': False, "
    rb"'shape': \(((?:\d{1,18}, )*(?:\d{1,18},?)?)\), \} *\n"
)


class Header(NamedTuple):
    """The shape and type of an array, and how many bytes of its file come before its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    num_bytes: int

    @property
    def num_value_bytes(self) -> int:
        """Bytes of the values, a Python integer of any size."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


def parse_header(start: bytes, file: str, array: str) -> Header:
    """Return the header that a ``.npy`` file starts with; ``start`` has at least `LONGEST_HEADER` bytes, or all.

    The names of the ``file`` that was read and of the ``array`` in it stand in errors.

    Raises DamagedFileError for anything that ``numpy.save`` does not write of a C-ordered array of numbers or text.
    """
    begin = _START.match(start)
    size = 10 + int.from_bytes(begin[1], "little") if begin else 0
    found = _HEADER.fullmatch(start[10:size]) if 0 < size <= LONGEST_HEADER else None
    if found is None:
        raise DamagedFileError(
            f"{file} is damaged: {array} begins with {start[:16]!r}, as no .npy file of numbers does."
        )
    try:
        dtype = np.dtype(found[1].decode())
    except (TypeError, ValueError, OverflowError):
        raise DamagedFileError(
            f"{file} is damaged: {array} is of type {found[1].decode()}, which there is not."
        ) from None
    shape = tuple(int(length) for length in found[2].decode().replace(",", " ").split())
    return Header(shape, dtype, size)
