"""Zip archives that anyone may have made: sizes before content, every checksum, nothing larger than it says."""

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.names import plain_name
from core.reading import DamagedFileError, open_regular

PIECE_BYTES = 2**20  # of a file at once; also the longest directory of an archive
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_LONGEST_MESSAGE = 200


class _InPieces(io.BufferedReader):
    """A file of which nothing is read in one piece that an archive's own words could make too large."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as usual. Raises zipfile.BadZipFile for more than `PIECE_BYTES`."""
        to_the_end = size is None or size < 0
        found = super().read(PIECE_BYTES + 1 if to_the_end else min(size or 0, PIECE_BYTES + 1))
        if len(found) > PIECE_BYTES:
            raise zipfile.BadZipFile(f"more than {PIECE_BYTES} bytes are asked for at once")
        return found


@contextmanager
def opened(source: Path | bytes, sentence: Callable[[str], str]) -> Iterator[zipfile.ZipFile]:
    """Open an archive, a file or the content of one, to be read in the block.

    Raises OSError as `open` does, and DamagedFileError for what is no archive, or is damaged where the block meets it;
    ``sentence`` makes one of what was wrong.
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

    Raises DamagedFileError for a name that comes twice, an encrypted member, a rare kind of compression, and, with
    ``plain_names``, UnsafeNameError for a name with a path in it.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = plain_name(member.orig_filename, str(path)) if plain_names else member.orig_filename
        if name in found:
            raise DamagedFileError(f"{path} is damaged: it holds {name!r} twice.")
        if member.compress_type not in _METHODS or member.flag_bits & _ENCRYPTED:
            raise DamagedFileError(f"{path} is damaged: {name!r} in it is encrypted, or compressed in a rare way.")
        found[name] = member
    return found


def require_sound(archive: zipfile.ZipFile, path: Path, most_bytes: int) -> None:
    """Read all members against their checksums and let go of them.

    Raises DamagedFileError where they take more than ``most_bytes`` together, and zipfile.BadZipFile for damage.
    """
    members = members_of(archive, path, plain_names=False)
    if (size := sum(member.file_size for member in members.values())) > most_bytes:
        raise DamagedFileError(f"{path} says that it unpacks to {size} bytes, but at most {most_bytes} are read of it.")
    if not any(member.CRC for member in members.values()):
        return  # saved by PyTorch without checksums
    for member in members.values():
        with archive.open(member) as content:
            while content.read(PIECE_BYTES):
                pass


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:_LONGEST_MESSAGE]
