"""Write named tensors as a safetensors file to any stream, and read one into tensors that exist; hash the bytes.

The safetensors library writes to paths only, and holds Python's global lock meanwhile; a checkpoint is written
asynchronously, and also to object stores. Reading here hashes and copies in one pass over a mapped file.
"""

import ctypes
import errno
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor
from xxhash import xxh3_128

from core.reading import DamagedFileError, open_regular
from core.records import parse_object
from train.checksums import Checksum, Checksums, Hasher

_PIECE_BYTES = 2**20  # written or copied, and hashed, while it is in the processor's cache
_POPULATE_READ = 22  # Linux's MADV_POPULATE_READ
_LONGEST_HEADER = 100_000_000  # bytes; the library's limit
_NAMES = {  # in the order in which the library writes them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> Checksums:
    """Write contiguous tensors on the CPU; return the hashes of the bytes.

    The bytes are those of ``safetensors.torch.save``: the length of the header in 8 bytes, a JSON header padded to a
    multiple of 8 bytes, then the tensors, sorted by dtype (wider ones first) and name.
    """
    identity, fast = blake3(), xxh3_128()
    ordered = in_file_order(tensors)
    _reserve(file, len(_header_of(ordered)) + sum(value.nbytes for value in ordered.values()))
    for piece in _pieces(ordered):
        identity.update(piece)
        fast.update(piece)
        file.write(piece)
    return Checksums(identity.hexdigest(), fast.hexdigest())


def _reserve(file: IO[bytes], num_bytes: int) -> None:
    """Allocate the blocks of a new file at once, which takes less time than one after the other, where that is known.

    Python's `os.posix_fallocate` writes to each block where a file system cannot allocate; Linux's own call fails.
    """
    fallocate = getattr(ctypes.CDLL(None), "fallocate", None)
    with suppress(OSError, AttributeError):  # a stream to a bucket has no descriptor
        if fallocate is not None:
            fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes))


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the order in which a file has them."""
    return dict(sorted(tensors.items(), key=lambda item: (_RANKS[item[1].dtype], item[0])))


def _pieces(ordered: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield _header_of(ordered)
    for value in ordered.values():
        content = memoryview(_bytes_of(value).data)
        for start in range(0, len(content), _PIECE_BYTES):
            yield content[start : start + _PIECE_BYTES]


def _header_of(ordered: Mapping[str, Tensor]) -> bytes:
    header, offset = {}, 0
    for name, value in ordered.items():
        end = offset + value.nbytes
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor on the CPU as an array of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class TensorFile:
    """A safetensors file as `write_tensors` writes it, mapped into memory; no value in it is believed yet."""

    def __init__(self, path: Path, file: IO[bytes], mapped: mmap.mmap) -> None:
        self._path, self._file, self._mapped = path, file, mapped
        self.size = len(mapped)

    def described(self) -> dict[str, Tensor] | None:
        """Return tensors without memory that have the names, dtypes and shapes of the file's header, in its order.

        Returns None for a file that `write_tensors` does not write: of another order, or of a size that is not that of
        its tensors.
        """
        length = int.from_bytes(self._mapped[:8], "little")
        header = self._mapped[: 8 + min(length, _LONGEST_HEADER)]
        try:
            entries = parse_object(header[8:], str(self._path)).items()
            tensors = {
                name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
                for name, entry in entries
            }
            is_ours = header == _header_of(in_file_order(tensors))
        except (KeyError, TypeError, ValueError, RuntimeError):
            return None
        is_whole = self.size == len(header) + sum(value.nbytes for value in tensors.values())
        return tensors if is_ours and is_whole else None

    def close(self) -> None:
        """Close a file that is not read."""
        self._file.close()

    def read_into(self, tensors: Mapping[str, Tensor], checksum: Checksum) -> str:
        """Fill contiguous tensors on the CPU that are as `described`, in that order; close the file; return its hash.

        It is computed of what the tensors got, so that a file that changes meanwhile is noticed.
        """
        with self._file:
            return self._read_into(tensors, checksum.hasher())

    def _read_into(self, tensors: Mapping[str, Tensor], hasher: Hasher) -> str:
        source = np.frombuffer(self._mapped, dtype=np.uint8)
        start = self.size - sum(value.nbytes for value in tensors.values())
        hasher.update(self._mapped[:start])
        for value in tensors.values():
            target = _bytes_of(value)
            for at in range(0, len(target), _PIECE_BYTES):
                piece = target[at : at + _PIECE_BYTES]
                self._make_resident(start, len(piece))
                np.copyto(piece, source[start : start + len(piece)])
                hasher.update(piece.data)
                start += len(piece)
        return hasher.hexdigest()

    def _make_resident(self, start: int, length: int) -> None:
        """Read a piece that is not in memory yet; a disk's error is an OSError here, but ends a process that copies."""
        if not (self._is_resident(start) and self._is_resident(start + length - 1)):
            page = start - start % mmap.PAGESIZE
            try:
                self._mapped.madvise(_POPULATE_READ, page, start + length - page)
            except OSError as error:
                if error.errno != errno.EINVAL:  # which Linux before 5.14 gives
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(self._path)) from error

    def _is_resident(self, at: int) -> bool:
        try:
            return os.preadv(self._file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):  # the file system cannot tell, or the system is not Linux
            return False


def open_tensors(path: Path) -> TensorFile:
    """Map a file of tensors. Raises as `open_regular` does, and DamagedFileError for an empty file."""
    file = open_regular(path)
    try:
        return TensorFile(path, file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:
        file.close()
        raise DamagedFileError(f"{path} is empty.") from None
