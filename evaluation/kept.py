"""Cache results for later jobs as files, each with a sealed record of its identity and hash.

A file is used only if the record next to it has its hash and the wanted identity. Damaged files are reported on
standard error and computed again.
"""

import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, JsonValue

from core.atomic import write_bytes
from core.reading import DamagedFileError, read_regular
from core.records import read_record, seal

T = TypeVar("T")

MAX_BYTES = 2**34  # of one cached file, which is read whole
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class _Record:
    """The record of a cached file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    identity: dict[str, JsonValue]
    num_bytes: Annotated[int, Field(ge=0, le=MAX_BYTES)]
    sha256: Sha256


def write_kept(path: Path, content: bytes, identity: Mapping[str, Any]) -> None:
    """Write a file, then its record with the identity."""
    record = {"identity": dict(identity), "num_bytes": len(content), "sha256": sha256(content).hexdigest()}
    write_bytes(path, content)
    write_bytes(record_of(path), json.dumps(seal(record)).encode())


def read_kept(path: Path, identity: Mapping[str, Any]) -> bytes:
    """Return a cached file's content.

    Raises the OSErrors of `open`, and DamagedFileError where the file or its record was changed, or has another
    identity.
    """
    record = read_record(record_of(path), _Record)
    if record.identity != json.loads(json.dumps(identity)):
        raise DamagedFileError(f"{record_of(path)} is the record of another result than {path.name}.")
    if (size := path.stat().st_size) != record.num_bytes:
        raise DamagedFileError(f"{path} is damaged: it has {size} bytes, but its record says {record.num_bytes}.")
    content = read_regular(path, record.num_bytes)
    if (found := sha256(content).hexdigest()) != record.sha256:
        raise DamagedFileError(f"{path} is damaged: it has sha256 {found}, but its record says {record.sha256}.")
    return content


def record_of(path: Path) -> Path:
    """Return the path of a cached file's record."""
    return path.with_suffix(".json")


def unless_damaged(read: Callable[[], T]) -> T | None:
    """Return the result of ``read``, or None where the cached file does not exist or is damaged.

    Damage is reported in one line on standard error. Raises PermissionError where the file may not be read.
    """
    try:
        return read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise
    except (DamagedFileError, OSError) as error:
        print(f"warning: {' '.join(str(error).split()).rstrip('.')}; it is made again.", file=sys.stderr)
        return None


def npy_of(array: NDArray[Any]) -> bytes:
    """Return an array as the content of a ``.npy`` file."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def parse_npy(content: bytes, path: Path, shape: tuple[int | None, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Return the array of a ``.npy`` file's content; None in ``shape`` accepts any length.

    Raises DamagedFileError that names ``path`` for another shape or dtype, or values that are not finite.
    """
    try:
        array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # of many types, since a damaged header can hold anything
        raise DamagedFileError(f"{path} is damaged: it is not a .npy file ({type(error).__name__}).") from None
    fits = len(array.shape) == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise DamagedFileError(
            f"{path} is damaged: it holds {array.dtype} {array.shape}, but should hold {np.dtype(dtype)} ({wanted})."
        )
    if not np.isfinite(array).all():
        raise DamagedFileError(f"{path} is damaged: it holds values that are not finite.")
    return array
