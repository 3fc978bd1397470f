"""Read a file of tensors that any program may have written: by ``torch.save``, in either format, or safetensors.

No code in the file is run, and PyTorch's own messages, which suggest running it, are never shown. Checksums are checked
before the tensors are used, since `torch.load` does not check them.
"""

import argparse
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from core.reading import DamagedFileError, open_regular
from core.records import parse_object

_ZIP, _PICKLE, _POINTER = b"PK\x03\x04", b"\x80", b"version https://git-lfs"
_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number that an old file of `torch.save` begins with
_END_OF_ZIP = b"PK\x05\x06"
_HEAD_BYTES = 64  # read from the beginning of a file to tell its format
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library does not read a longer one
_REFUSED = (  # patterns by which PyTorch's restricted loader names what it refuses to load
    r"GLOBAL (\S+) was not an allowed",
    r"unsupported GLOBAL (\S+) whose module",
    r"add_safe_globals`,? but got <class '([\w.]+)",
    r"unrecognized function <(?:class '|function |built-in \w+ )([\w.]+)",
    r"must be imported to load (.+)",
)


@dataclass(frozen=True)
class WeightFile:
    """The content of a file of weights: nested mappings of tensors, and the trainer's own arguments."""

    content: Mapping[str, Any]
    arguments: Mapping[str, Any]  # command-line arguments of its trainer, if it saved them


def read_weight_file(path: Path) -> WeightFile:
    """Read a file of tensors and plain values into CPU memory.

    Raises ValueError, in one sentence that names the file, where it is missing, not a regular file, empty, cut short,
    damaged, of another kind, or contains anything that would run code.
    """
    try:
        with open_regular(path) as file:
            head, size = file.read(_HEAD_BYTES), os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"There is no file {path}; give one that exists.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give another file.") from None
    if size == 0:
        raise DamagedFileError(f"{path} is empty (0 bytes); copy or download it again.")
    if _is_safetensors(path, head, size):
        return WeightFile(_read_safetensors(path, size), {})
    if head.startswith(_ZIP):
        _require_whole_archive(path, size)
        content = _load(path, mmap=True)
    elif head.startswith(_PICKLE) and (_MAGIC in head or size < _HEAD_BYTES):
        content = _load(path, mmap=False)
    else:
        raise DamagedFileError(_unlike_weights(path, head, size))
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} has no table of weights, but a {type(content).__name__}; give a .pt file of a released program, "
            "or a .safetensors file."
        )
    said = content.get("args")
    arguments = vars(said) if isinstance(said, argparse.Namespace) else said
    return WeightFile(content, arguments if isinstance(arguments, dict) else {})


def _is_safetensors(path: Path, head: bytes, size: int) -> bool:
    return (path.suffix == ".safetensors" and not head.startswith((_ZIP, _POINTER))) or head[8:9] == b"{"


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    """Read all tensors. The lengths in the header tell a file that was cut short from other damage."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise DamagedFileError(f"{path} is not a safetensors file: its header claims {length} bytes.")
        text = file.read(length)
    if size < 8 + length:
        raise _cut_short(path, size, f"its header alone has {8 + length}")
    header = parse_object(text, str(path))
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (TypeError, KeyError, IndexError, AttributeError):
        raise DamagedFileError(f"{path} is damaged: its header is not that of a safetensors file.") from None
    if size < expected:
        raise _cut_short(path, size, f"its header describes {expected}")
    return _guarded(path, lambda: load_file(path))


def _require_whole_archive(path: Path, size: int) -> None:
    """Check an archive that `torch.save` wrote: its directory, and each record against its CRC-32."""
    with open_regular(path) as file:
        file.seek(max(0, size - 2**16 - 22))
        tail = file.read()
        if not 0 <= tail.rfind(_END_OF_ZIP) <= len(tail) - 22:
            raise _cut_short(path, size, "the directory at its end is missing")
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                # With `set_crc32_options(False)`, torch.save writes zero for every checksum.
                damaged = archive.testzip() if any(record.CRC for record in records) else None
        except Exception as error:  # zipfile raises errors of any kind for damaged files
            raise DamagedFileError(f"{path} is damaged: {_line(error)}; copy or download it again.") from None
    if damaged is not None:
        raise DamagedFileError(f"{path} is damaged: the checksum of {damaged} in it is wrong; download it again.")
    names = [record.filename.partition("/")[2] for record in records]
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise ValueError(f"{path} is a TorchScript program, which is never run; give the weights alone.")
    if "data.pkl" not in names:
        raise ValueError(f"{path} is an archive, but not one that torch.save wrote: it has no data.pkl.")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError(f"{path} was repacked by another program; unpack it and save it by torch.save.")


def _load(path: Path, mmap: bool) -> Any:
    def load() -> Any:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the released trainer saves its arguments as one
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    return _guarded(path, load)


def _guarded(path: Path, load: Callable[[], Any]) -> Any:
    """Call a loader, and raise its errors as sentences of ours."""
    try:
        return load()
    except MemoryError:
        raise
    except Exception as error:  # loaders raise errors of any kind for damaged files
        message = str(error)
        if name := next((found.group(1) for text in _REFUSED if (found := re.search(text, message))), None):
            raise ValueError(
                f"{path} is refused: besides tensors and plain values it has {name}, and loading that would run code "
                "of whoever wrote the file; if you trust it, load it with the program that wrote it and save the "
                "tensors alone, as torch.save({'ema': checkpoint['ema']}, 'weights.pt')."
            ) from None
        size = path.stat().st_size
        if isinstance(error, EOFError) or "unexpected EOF" in message or _ends_early(path):
            raise _cut_short(path, size, "its tensors need more") from None
        raise DamagedFileError(
            f"{path} is damaged, or not a file of weights ({type(error).__name__} when reading its {size} bytes); copy "
            "or download it again."
        ) from None


def _ends_early(path: Path) -> bool:
    """Return whether an old file of `torch.save` ends within one of the five pickles that come before its tensors."""
    with open_regular(path) as file:
        try:
            for _ in range(5):
                for _ in pickletools.genops(file):  # parses the opcodes without running them
                    pass
        except Exception:  # pickletools raises errors of any kind for damaged files
            return not file.read(1)
    return False


def _cut_short(path: Path, size: int, expected: str) -> DamagedFileError:
    return DamagedFileError(f"{path} is cut short: it has {size} bytes, but {expected}; copy or download it again.")


def _unlike_weights(path: Path, head: bytes, size: int) -> str:
    if head.startswith(_POINTER):
        return f"{path} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`."
    if head.startswith(_PICKLE):
        return f"{path} is a pickle that torch.save did not write, so it is not loaded; save its tensors by torch.save."
    if len(head) < len(_ZIP) or _ZIP.startswith(head):
        return f"{path} is cut short: it has {size} bytes; copy or download it again."
    return (
        f"{path} is neither a PyTorch nor a safetensors file: it begins with {head[:16]!r}; give a .pt file of a "
        "released program, a .safetensors file, or a diffusers folder."
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
