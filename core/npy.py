"""Read the header of a ``.npy`` file without evaluating it; numpy's own reader parses it as a Python literal."""

import re
from typing import IO, Any, NamedTuple

import numpy as np

from core.reading import DamagedFileError

LONGEST_HEADER = 2**10  # bytes; numpy writes 128 for the arrays of this program's formats
_BEFORE_HEADER = 10  # bytes: magic, version, length of the header
_START = re.compile(rb"\x93NUMPY\x01\x00(..)", re.DOTALL)
_HEADER = re.compile(
    rb"\{'descr': '([<>|][biufUS][1-9]\d{0,8})', 'fortran_order': False, "
    rb"'shape': \(((?:\d{1,18}, )*(?:\d{1,18},?)?)\), \} *\n"
)


class Header(NamedTuple):
    """The shape and dtype of an array, and the number of bytes before its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    num_bytes: int
    fortran_order: bool = False

    @property
    def num_value_bytes(self) -> int:
        """Return the bytes of the values, as a Python integer, which cannot overflow."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


def parse_header(start: bytes, file: str, array: str) -> Header:
    """Return the header of a ``.npy`` file from its ``start``, at least `LONGEST_HEADER` bytes or the whole file.

    Errors name the ``file`` that was read and the ``array`` in it. Raises DamagedFileError for any header other than
    the one ``numpy.save`` writes for a C-ordered array of numbers or text.
    """
    begin = _START.match(start)
    size = _BEFORE_HEADER + int.from_bytes(begin[1], "little") if begin else 0
    found = _HEADER.fullmatch(start[_BEFORE_HEADER:size]) if 0 < size <= LONGEST_HEADER else None
    if found is None:
        raise DamagedFileError(
            f"{file} is damaged: {array} begins with {start[:16]!r}, unlike any .npy file of numbers."
        )
    try:
        dtype = np.dtype(found[1].decode())
    except (TypeError, ValueError, OverflowError):
        raise DamagedFileError(
            f"{file} is damaged: {array} has the dtype {found[1].decode()}, which does not exist."
        ) from None
    shape = tuple(int(length) for length in found[2].decode().replace(",", " ").split())
    return Header(shape, dtype, size)


def read_header(content: IO[bytes], file: str, array: str) -> Header:
    """Read the header of a ``.npy`` file and nothing after it. Raises as `parse_header` does."""
    start = content.read(_BEFORE_HEADER)
    length = int.from_bytes(start[_BEFORE_HEADER - 2 :], "little")
    return parse_header(start + content.read(min(length, LONGEST_HEADER)), file, array)


def read_foreign_header(content: IO[bytes], array: str) -> Header:
    """Read the header of any array of plain values, of any memory order and format version, with numpy's own reader.

    Raises ValueError where there is no header, and DamagedFileError for Python objects or a negative length.
    """
    version = np.lib.format.read_magic(content)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(content)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise DamagedFileError(f"{array} is {dtype} {shape}, which is not an array of plain values.")
    return Header(tuple(map(int, shape)), dtype, content.tell(), fortran_order)
