"""Small ``.npz`` files: written without clocks, read without trusting a word that they say of their size."""

import io
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.atomic import atomic_file
from data.npy import LONGEST_HEADER, parse_header
from data.reading import DamagedFileError

_ENTRY = b"PK\x01\x02"  # how the directory of a zip file begins each of its entries
_MOST_ENTRIES = 64
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    ValueError,  # with UnicodeDecodeError
    EOFError,
    KeyError,
    IndexError,
    OverflowError,
    RuntimeError,  # an encrypted member; NotImplementedError is one, too
)


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays uncompressed and atomically, so that equal arrays give equal bytes."""
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())


def read_npz(content: bytes, name: str, wanted: Collection[str]) -> dict[str, NDArray[Any]]:
    """Return the ``wanted`` arrays of an ``.npz`` that `write_npz` wrote; ``name`` stands in errors.

    Needs no more memory than ``content`` has bytes. Raises DamagedFileError where an array is missing or comes twice,
    is compressed, holds objects, has another size than its header says, or fails its checksum.
    """
    if content.count(_ENTRY) > _MOST_ENTRIES:  # before a directory of millions of entries is made
        raise DamagedFileError(f"{name} is damaged: it has more than {_MOST_ENTRIES} members.")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            for array in wanted:
                if (count := names.count(f"{array}.npy")) != 1:
                    raise DamagedFileError(f"{name} is damaged: it has {count} arrays called {array}, not one.")
            return {array: _array(archive, names.index(f"{array}.npy"), name, array) for array in wanted}
    except DamagedFileError:
        raise
    except _ZIP_ERRORS as error:
        raise DamagedFileError(f"{name} is damaged: it is not a sound .npz file ({_one_line(error)}).") from None


def _array(archive: zipfile.ZipFile, number: int, name: str, array: str) -> NDArray[Any]:
    member = archive.infolist()[number]
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise DamagedFileError(f"{name} is damaged: {array} is compressed, but this program compresses none.")
    with archive.open(member) as file:
        values = file.read()
    header = parse_header(values[:LONGEST_HEADER], name, array)
    if (found := len(values) - header.num_bytes) != header.num_value_bytes:
        raise DamagedFileError(
            f"{name} is damaged: {array} is {header.dtype}{list(header.shape)} of {header.num_value_bytes} bytes, but "
            f"there are {found}."
        )
    return np.frombuffer(values, header.dtype, offset=header.num_bytes).reshape(header.shape)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
