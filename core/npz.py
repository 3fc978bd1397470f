"""Write npz files of any size in blocks and without timestamps; read npz files as untrusted input."""

import io
import math
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.archives import PIECE_BYTES, members_of, opened
from core.atomic import atomic_file
from core.npy import LONGEST_HEADER, Header, parse_header, read_foreign_header, read_header
from core.reading import DamagedFileError

_BLOCK_BYTES = 2**26
_SUFFIX = ".npy"
_ENTRY = b"PK\x01\x02"  # signature of each entry in the directory of a zip file
_MOST_ENTRIES = 64
_MEMBER = struct.Struct("<4s2xHH16xHH")  # before each member: signature, flags, method, lengths of name and extra field
_MEMBER_SIGNATURE = b"PK\x03\x04"


@dataclass(frozen=True)
class Blocks:
    """An array given as blocks of rows."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Iterable[NDArray[Any]]

    @classmethod
    def of(cls, array: NDArray[Any]) -> "Blocks":
        """Return an array in memory as blocks."""
        if array.ndim == 0:
            return cls(array.shape, array.dtype, [array])
        rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
        return cls(array.shape, array.dtype, (array[start : start + rows] for start in range(0, len(array), rows)))


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any] | Blocks], zip64: bool = False) -> None:
    """Write arrays uncompressed and atomically, so that equal arrays give equal bytes.

    ``numpy.load`` reads the file without pickles. ``zip64`` writes the header for large members also for small ones,
    as ``numpy.savez`` does.
    """
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            _write_member(archive, name, array if isinstance(array, Blocks) else Blocks.of(array), zip64)


def _write_member(archive: zipfile.ZipFile, name: str, array: Blocks, zip64: bool) -> None:
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(header, description)
    info = zipfile.ZipInfo(f"{name}{_SUFFIX}")
    info.file_size = len(header.getvalue()) + math.prod(array.shape) * array.dtype.itemsize
    with archive.open(info, "w", force_zip64=zip64) as member:
        member.write(header.getvalue())
        for block in array.blocks:
            member.write(np.ascontiguousarray(block, dtype=array.dtype).tobytes())


def read_npz(content: bytes, name: str, wanted: Collection[str]) -> dict[str, NDArray[Any]]:
    """Return the ``wanted`` arrays of an ``.npz`` that `write_npz` wrote; errors call the file ``name``.

    The arrays need no more memory than ``content``. Raises DamagedFileError where an array is missing, a name is
    duplicated, or an array is compressed, holds objects, does not have the size in its header, or fails its checksum.
    """
    if content.count(_ENTRY) > _MOST_ENTRIES:  # before zipfile builds a directory of possibly millions of entries
        raise DamagedFileError(f"{name} is damaged: it has more than {_MOST_ENTRIES} members.")
    with opened(content, lambda what: f"{name} is damaged: it is not a valid .npz file ({what}).") as archive:
        members = members_of(archive, name, plain_names=False)
        if any(member.file_size > len(content) for member in members.values()):
            raise DamagedFileError(f"{name} is damaged: it states that an array is larger than the whole file.")
        return {array: _read_own(archive, members, name, array) for array in wanted}


def _read_own(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str, array: str) -> NDArray[Any]:
    member = members.get(f"{array}{_SUFFIX}")
    if member is None:
        raise DamagedFileError(f"{name} is damaged: it has no array called {array}.")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise DamagedFileError(f"{name} is damaged: {array} is compressed, but this program compresses none.")
    with archive.open(member) as content:
        header = read_header(content, name, array)
        _require_size(header, member, f"{array} in {name}")
        return _read_whole(content, header)


class Place(NamedTuple):
    """The header of an array in an npz file, and the offset of its values in bytes."""

    offset: int
    header: Header


def places_in(read: Callable[[int, int], bytes], size: int, name: str, wanted: Sequence[str]) -> dict[str, Place]:
    """Return the places of the ``wanted`` arrays, with which an ``.npz`` of `write_npz` begins, in this order.

    ``read(start, count)`` returns bytes of the file, fewer behind its end at ``size``; no values are read, so that the
    caller must know by a hash that they are whole. Raises DamagedFileError that names the file where the arrays are
    others, are compressed or do not lie in the file.
    """
    position, places = 0, {}
    for array in wanted:
        start = read(position, _MEMBER.size)
        signature, _, method, name_bytes, more = _MEMBER.unpack(start.ljust(_MEMBER.size, b"\0"))
        begin = position + _MEMBER.size + name_bytes + more
        member = f"{array}{_SUFFIX}".encode()
        is_ours = signature == _MEMBER_SIGNATURE and method == zipfile.ZIP_STORED
        if not is_ours or read(position + _MEMBER.size, name_bytes) != member:
            raise DamagedFileError(f"{name} is damaged: it has no array called {array} at byte {position}.")
        header = parse_header(read(begin, LONGEST_HEADER), name, array)
        places[array] = Place(begin + header.num_bytes, header)
        position = begin + header.num_bytes + header.num_value_bytes
        if position > size:
            raise DamagedFileError(f"{name} is damaged: {array} would end at byte {position} of {size}.")
    return places


def headers_of(path: Path) -> dict[str, Header]:
    """Return the header of each array in an untrusted file.

    Raises OSError as `open` does, and ValueError that names the file where it is not an npz, a name is duplicated or
    contains a path, an array holds Python objects, or the size in a header is not that of its member.
    """
    with opened(path, lambda what: f"{path} cannot be read as an .npz ({what}); is it complete?") as archive:
        found = {}
        for name, member in members_of(archive, path, plain_names=True).items():
            if not name.endswith(_SUFFIX):
                raise DamagedFileError(f"{path} holds {name!r}, which is not an array; fetch or make it again.")
            with archive.open(member) as content:
                found[name.removesuffix(_SUFFIX)] = _read_foreign(content, member, f"{name} in {path}")
    return found


def read_array(path: Path, name: str, most_bytes: int) -> NDArray[Any]:
    """Return one array of a reference.

    Raises ValueError where it takes more than ``most_bytes`` or is damaged.
    """
    with _reference(path, name) as archive, archive.open(f"{name}{_SUFFIX}") as member:
        header = _read_foreign(member, archive.getinfo(f"{name}{_SUFFIX}"), f"{name} in {path}")
        if (size := header.num_value_bytes) > most_bytes:
            raise DamagedFileError(f"{name} in {path} takes {size} bytes, but at most {most_bytes} are read.")
        return _read_whole(member, header)


def rows_of(path: Path, name: str, rows: int) -> Iterator[NDArray[Any]]:
    """Yield an array of a reference in blocks of ``rows``, each read on demand.

    Raises ValueError as `read_array` does; a wrong checksum is detected after the last block.
    """
    with _reference(path, name) as archive, archive.open(f"{name}{_SUFFIX}") as member:
        header = _read_foreign(member, archive.getinfo(f"{name}{_SUFFIX}"), f"{name} in {path}")
        length, *of_row = header.shape
        whole = _read_whole(member, header) if header.fortran_order else None
        for start in range(0, length, rows):
            if whole is not None:
                yield whole[start : start + rows]
                continue
            count = min(rows, length - start)
            yield _read_values(member, count * math.prod(of_row), header.dtype).reshape(count, *of_row)
        _require_end(member)


def _reference(path: Path, name: str) -> AbstractContextManager[zipfile.ZipFile]:
    return opened(path, lambda what: f"{name} of the reference {path} cannot be read ({what}); fetch or make it again.")


def _read_foreign(content: IO[bytes], member: zipfile.ZipInfo, name: str) -> Header:
    header = read_foreign_header(content, name)
    _require_size(header, member, name)
    return header


def _require_size(header: Header, member: zipfile.ZipInfo, name: str) -> None:
    """Raise DamagedFileError where the size in a header is not that of its member."""
    if (found := member.file_size - header.num_bytes) != header.num_value_bytes:
        raise DamagedFileError(
            f"{name} is damaged: {header.dtype} {header.shape} takes {header.num_value_bytes} bytes, but the file "
            f"says {found}."
        )


def _read_whole(content: IO[bytes], header: Header) -> NDArray[Any]:
    flat = _read_values(content, math.prod(header.shape), header.dtype)
    _require_end(content)
    return flat.reshape(header.shape, order="F" if header.fortran_order else "C")


def _read_values(content: IO[bytes], count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the next ``count`` values, [count]."""
    values = np.empty(count, dtype)
    target, done = values.view(np.uint8) if values.nbytes else np.empty(0, np.uint8), 0
    while done < len(target):
        piece = content.read(min(PIECE_BYTES, len(target) - done))
        if not piece:
            raise EOFError(f"it ends after {done} of {len(target)} bytes")
        target[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    return values


def _require_end(content: IO[bytes]) -> None:
    """Read to the end, where zipfile compares the checksum. Raises EOFError where data are left."""
    if content.read(1):
        raise EOFError("it is longer than its header says")
