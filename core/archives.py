"""Read untrusted zip archives: check sizes before content, verify every checksum, never exceed the stated size."""

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.names import plain_name
from core.reading import DamagedFileError, open_regular

PIECE_BYTES = 2**20  # read at once; also the largest directory of an archive
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_LONGEST_MESSAGE = 200


class _InPieces(io.BufferedReader):
    """A file that limits each read, because zipfile takes the length of a read from the untrusted archive."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to ``size`` bytes. Raises zipfile.BadZipFile for more than `PIECE_BYTES`."""
        to_the_end = size is None or size < 0
        found = super().read(PIECE_BYTES + 1 if to_the_end else min(size or 0, PIECE_BYTES + 1))
        if len(found) > PIECE_BYTES:
            raise zipfile.BadZipFile(f"more than {PIECE_BYTES} bytes are asked for at once")
        return found


@contextmanager
def opened(source: Path | bytes, sentence: Callable[[str], str]) -> Iterator[zipfile.ZipFile]:
    """Open an archive, given as a path or as its content, for the block.

    Raises OSError as `open` does, and DamagedFileError where it is not an archive or the block finds damage;
    ``sentence`` turns the fault into the error's sentence.
    """
    raw: Any = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source).detach()
    with _InPieces(raw) as pieces:
        try:
            with zipfile.ZipFile(pieces) as archive:
                yield archive
        except DamagedFileError:
            raise
        except Exception as error:  # damage of an archive raises errors of many kinds
            raise DamagedFileError(sentence(one_line(error))) from None


def members_of(archive: zipfile.ZipFile, path: Path | str, plain_names: bool) -> dict[str, zipfile.ZipInfo]:
    """Return the members of an archive by their names.

    Raises DamagedFileError for a duplicate name, an encrypted member or an unsupported compression, and, with
    ``plain_names``, UnsafeNameError for a name that contains a path.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = plain_name(member.orig_filename, str(path)) if plain_names else member.orig_filename
        if name in found:
            raise DamagedFileError(f"{path} is damaged: it holds {name!r} twice.")
        if member.compress_type not in _METHODS or member.flag_bits & _ENCRYPTED:
            raise DamagedFileError(f"{path} is damaged: {name!r} in it is encrypted, or its compression is not read.")
        found[name] = member
    return found


def require_sound(archive: zipfile.ZipFile, path: Path, most_bytes: int) -> None:
    """Verify the checksums of all members, without keeping their content.

    Raises DamagedFileError where they unpack to more than ``most_bytes`` in total, and zipfile.BadZipFile for damage.
    """
    members = members_of(archive, path, plain_names=False)
    if (size := sum(member.file_size for member in members.values())) > most_bytes:
        raise DamagedFileError(f"{path} says that it unpacks to {size} bytes, but at most {most_bytes} are read of it.")
    if not any(member.CRC for member in members.values()):
        return  # PyTorch can save without checksums
    for member in members.values():
        with archive.open(member) as content:
            while content.read(PIECE_BYTES):
                pass


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:_LONGEST_MESSAGE]
