"""Write named tensors as a safetensors file to any stream, and hash the bytes on the way.

The safetensors library writes to paths only, and holds Python's global lock meanwhile; a checkpoint is written
asynchronously, and also to object stores. The library reads the files.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import IO

import torch
from torch import Tensor

_PIECE_BYTES = 16 * 2**20
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
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> str:
    """Write contiguous tensors on the CPU; return the hexadecimal SHA-256 of the bytes.

    The bytes are those of ``safetensors.torch.save``: the length of the header in 8 bytes, a JSON header padded to a
    multiple of 8 bytes, then the tensors, sorted by dtype (wider ones first) and name.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (_RANKS[item[1].dtype], item[0])))
    digest = hashlib.sha256()
    for piece in _pieces(ordered):
        digest.update(piece)
        file.write(piece)
    return digest.hexdigest()


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    header, offset = {}, 0
    for name, value in tensors.items():
        end = offset + value.nbytes
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for value in tensors.values():
        content = memoryview(value.detach().reshape(-1).view(torch.uint8).numpy().data)
        for start in range(0, len(content), _PIECE_BYTES):
            yield content[start : start + _PIECE_BYTES]
