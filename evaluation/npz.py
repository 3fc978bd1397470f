"""npz files of any size: written in blocks, without clocks; looked into without reading them whole."""

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.atomic import atomic_file

_BLOCK_BYTES = 2**26


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
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for block in array.blocks:
            member.write(np.ascontiguousarray(block, dtype=array.dtype).tobytes())


class Header(NamedTuple):
    """What an array in a file is, without its content."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def headers_of(path: Path) -> dict[str, Header]:
    """Of each array. Raises ValueError for a file that is no npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _header_of(archive, name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an .npz ({error}); is it complete?") from error


def _header_of(archive: zipfile.ZipFile, name: str) -> Header:
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        return Header(shape, dtype)


def read_array(path: Path, name: str) -> NDArray[Any]:
    """One array of a reference. Raises ValueError where its bytes are not those that were written."""
    try:
        with np.load(path, allow_pickle=False) as file:
            array: NDArray[Any] = file[name]
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        raise ValueError(f"{name} of the reference {path} cannot be read ({error}); fetch or make it again.") from error
    return array
