"""The header of a ``.npy`` file, read without evaluating it: numpy's own reader takes it for a Python literal."""

import re
from typing import IO, Any, NamedTuple

import numpy as np

from core.reading import DamagedFileError

LONGEST_HEADER = 2**10  # bytes; numpy's are 128 for arrays of our formats
_BEFORE_HEADER = 10  # bytes: magic, version, length of the header
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
    fortran_order: bool = False

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
    size = _BEFORE_HEADER + int.from_bytes(begin[1], "little") if begin else 0
    found = _HEADER.fullmatch(start[_BEFORE_HEADER:size]) if 0 < size <= LONGEST_HEADER else None
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


def read_header(content: IO[bytes], file: str, array: str) -> Header:
    """Read the header that a ``.npy`` file begins with, and no further. Raises as `parse_header` does."""
    start = content.read(_BEFORE_HEADER)
    length = int.from_bytes(start[_BEFORE_HEADER - 2 :], "little")
    return parse_header(start + content.read(min(length, LONGEST_HEADER)), file, array)


def read_foreign_header(content: IO[bytes], array: str) -> Header:
    """Read the header of any array of plain values, in any order and version, by numpy's own reader.

    Raises ValueError where there is none, and DamagedFileError for one of Python objects or a negative length.
    """
    version = np.lib.format.read_magic(content)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(content)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise DamagedFileError(f"{array} is of {dtype} {shape}, which is no array of plain values.")
    return Header(tuple(map(int, shape)), dtype, content.tell(), fortran_order)
