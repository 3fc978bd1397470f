"""npz files of any size: written in blocks, without clocks; read without trusting what they say of themselves."""

import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.atomic import atomic_file
from data.reading import DamagedFileError
from evaluation.archives import PIECE_BYTES, members_of, opened

_BLOCK_BYTES = 2**26
_SUFFIX = ".npy"


@dataclass(frozen=True)
class Blocks:
    """An array that comes in blocks of rows."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Iterable[NDArray[Any]]

    @classmethod
    def of(cls, array: NDArray[Any]) -> "Blocks":
        """An array at hand, in pieces."""
        if array.ndim == 0:
            return cls(array.shape, array.dtype, [array])
        rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
        return cls(array.shape, array.dtype, (array[start : start + rows] for start in range(0, len(array), rows)))


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any] | Blocks]) -> None:
    """Write uncompressed, atomically; equal arrays give equal bytes. ``numpy.load`` reads it without pickles."""
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            _write_member(archive, name, array if isinstance(array, Blocks) else Blocks.of(array))


def _write_member(archive: zipfile.ZipFile, name: str, array: Blocks) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    with archive.open(zipfile.ZipInfo(f"{name}{_SUFFIX}"), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for block in array.blocks:
            member.write(np.ascontiguousarray(block, dtype=array.dtype).tobytes())


class Header(NamedTuple):
    """What an array in a file is, without its content."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the array, a Python integer of any size."""
        return math.prod(self.shape) * self.dtype.itemsize


def headers_of(path: Path) -> dict[str, Header]:
    """Return the header of each array.

    Raises OSError as `open` does, and ValueError, naming the file, for one that is no npz: also where a name comes
    twice or has a path in it, an array holds Python objects, or a header says another size than its member has.
    """
    with opened(path, lambda what: f"{path} cannot be read as an .npz ({what}); is it complete?") as archive:
        found = {}
        for name, member in members_of(archive, path, plain_names=True).items():
            if not name.endswith(_SUFFIX):
                raise DamagedFileError(f"{path} holds {name!r}, which is no array; fetch or make it again.")
            with archive.open(member) as content:
                found[name.removesuffix(_SUFFIX)] = _read_header(content, member, f"{name} in {path}")
    return found


def read_array(path: Path, name: str, most_bytes: int) -> NDArray[Any]:
    """Return one array of a reference.

    Raises ValueError where it takes more than ``most_bytes``, or its bytes are not those that were written.
    """
    with _archive_of(path, name) as archive, archive.open(f"{name}{_SUFFIX}") as member:
        header = _read_header(member, archive.getinfo(f"{name}{_SUFFIX}"), f"{name} in {path}")
        if header.num_bytes > most_bytes:
            raise DamagedFileError(
                f"{name} in {path} takes {header.num_bytes} bytes, but at most {most_bytes} are read."
            )
        return _read_whole(member, header)


def rows_of(path: Path, name: str, rows: int) -> Iterator[NDArray[Any]]:
    """Return an array of a reference in blocks of ``rows``, each read when it is asked for.

    Raises ValueError as `read_array` does, after the last block where a checksum is wrong.
    """
    with _archive_of(path, name) as archive, archive.open(f"{name}{_SUFFIX}") as member:
        header = _read_header(member, archive.getinfo(f"{name}{_SUFFIX}"), f"{name} in {path}")
        length, *of_row = header.shape
        whole = _read_whole(member, header) if header.fortran_order else None
        for start in range(0, length, rows):
            if whole is not None:
                yield whole[start : start + rows]
                continue
            count = min(rows, length - start)
            yield _read_values(member, count * math.prod(of_row), header.dtype).reshape(count, *of_row)
        _require_end(member)


def _archive_of(path: Path, name: str) -> AbstractContextManager[zipfile.ZipFile]:
    return opened(path, lambda what: f"{name} of the reference {path} cannot be read ({what}); fetch or make it again.")


def _read_header(content: IO[bytes], member: zipfile.ZipInfo, name: str) -> Header:
    """Return the header that a member begins with. Raises ValueError where its size is not that of the member."""
    version = np.lib.format.read_magic(content)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(content)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise DamagedFileError(f"{name} is of {dtype} {shape}, which is no array of plain values.")
    header = Header(tuple(map(int, shape)), dtype, fortran_order)
    if (found := member.file_size - content.tell()) != header.num_bytes:
        raise DamagedFileError(
            f"{name} is damaged: {dtype} {shape} takes {header.num_bytes} bytes, but the file says {found}."
        )
    return header


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
    """Read to the end, where the checksum of all that was read is compared."""
    if content.read(1):
        raise EOFError("it is longer than its header says")
