"""Read the files in a zip file, local or at a URL, one by one, without unpacking them to disk.

A zip file is untrusted: names that lead out of it, links and devices are left out, and no file is unpacked beyond the
size that the zip file states or beyond ``MAX_FILE_BYTES``.
"""

import stat
import struct
import zipfile
import zlib
from pathlib import Path

from core.names import UnsafeNameError, tree_name
from core.reading import kind_of_node
from core.remote import is_remote
from data.files import MAX_FILE_BYTES, Files, Listing
from data.images import UnreadableImageError
from data.unread import image_suffixes, is_litter

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of name and extra field
_EXTRA_BYTES = 256  # extra fields are rarely longer, so header and content are read in one request
_READ_AHEAD_BYTES = 2**20  # when the directory of a remote file is read


def is_zip(place: str) -> bool:
    """Return whether a place has the name of a zip file and is not a folder."""
    return place.lower().endswith(".zip") and (is_remote(place) or not Path(place).expanduser().is_dir())


class ZipFiles(Listing):
    """The files of a zip file. Where all images lie in subfolders of one folder, names are relative to that folder.

    Raises ValueError where the zip file is missing or damaged, or has two files of the same name.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.is_near = not is_remote(place)
        folder, _, self._name = place.rpartition("/")
        self._files = Files(folder or ("/" if place.startswith("/") else "."), recursive=False)
        if self._name not in self._files.sizes:
            reason = self._files.odd.get(self._name, "is missing")
            raise ValueError(f"{place} {reason}; give the zip file itself.")
        self._files.refuse_pointer(self._name)
        entries = self._entries()
        inside = [name for name in sorted(entries) if _is_inside(name)]
        reasons = {name: _why_no_file(entries[name]) for name in inside if not name.endswith("/")}
        root = _root_of([name for name, reason in reasons.items() if not reason])
        self._entry_of = {name.removeprefix(root): entries[name] for name, reason in reasons.items() if not reason}
        self.sizes = {name: info.file_size for name, info in self._entry_of.items()}
        self.odd = {name: "has a name that leads out of the zip file" for name in entries if not _is_inside(name)}
        self.odd |= {name.removeprefix(root): reason for name, reason in reasons.items() if reason}
        below = [name.removeprefix(root) for name in inside if name.startswith(root)]
        self.folders = sorted({name.split("/")[0] for name in below if "/" in name and not is_litter(name.strip("/"))})

    def _entries(self) -> dict[str, zipfile.ZipInfo]:
        found: dict[str, zipfile.ZipInfo] = {}
        try:
            with self._files.open(self._name, _READ_AHEAD_BYTES) as file, zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, EOFError, OverflowError, struct.error, UnicodeError) as error:
            raise ValueError(f"{self.place} is not a valid zip file ({error}); fetch or make it again.") from error
        for info in infos:
            name = info.filename.replace("\\", "/")  # some programs on Windows write backslashes
            if name in found and not name.endswith("/"):
                raise ValueError(f"{self.place} has {name} twice; names must be unique within a zip file.")
            found[name] = info
        return found

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the bytes start .. end - 1 of a file, or all of them; the checksum of a whole file is verified.

        Raises UnreadableImageError where the file cannot be unpacked or its checksum does not match.
        """
        info = self._entry_of[name]
        whole = info.file_size if end is None else min(end, info.file_size)
        if reason := _why_not_unpacked(info):
            raise UnreadableImageError(reason, name)
        content = self._unpacked(name, info, whole)
        if len(content) != whole:
            raise UnreadableImageError(f"it does not have the {info.file_size} bytes that the zip file states", name)
        if whole == info.file_size and zlib.crc32(content) != info.CRC:
            raise UnreadableImageError("it does not match its checksum in the zip file", name)
        return content[start or 0 :]

    def _unpacked(self, name: str, info: zipfile.ZipInfo, limit: int) -> bytes:
        """Return at most ``limit`` bytes, plus one where a whole file is longer than the zip file states."""
        packed = self._packed(name, info)
        if info.compress_type == zipfile.ZIP_STORED:
            return packed[:limit]
        more = 1 if limit == info.file_size else 0
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, limit + more) if limit + more else b""
        except zlib.error as error:
            raise UnreadableImageError(f"it cannot be unpacked ({error})", name) from error

    def _packed(self, name: str, info: zipfile.ZipInfo) -> bytes:
        """Return the content as stored in the zip file, without its local header."""
        start = info.header_offset
        size = _LOCAL_HEADER.size + len(info.orig_filename.encode()) + _EXTRA_BYTES + info.compress_size
        block = self._part(max(0, start), size)
        if start < 0 or len(block) < _LOCAL_HEADER.size or not block.startswith(b"PK\x03\x04"):
            raise UnreadableImageError("its header in the zip file is damaged", name)
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(block)
        first = _LOCAL_HEADER.size + name_bytes + extra_bytes
        if len(block) < first + info.compress_size:
            block = self._part(start, first + info.compress_size)
        return block[first : first + info.compress_size]

    def _part(self, start: int, size: int) -> bytes:
        return self._files.read(self._name, start, min(start + size, self._files.sizes[self._name]))


def _is_inside(name: str) -> bool:
    try:
        tree_name(name.removesuffix("/"), "the zip file")
    except UnsafeNameError:
        return False
    return True


def _why_no_file(info: zipfile.ZipInfo) -> str:
    """Return why an entry is not a regular file, or an empty string."""
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) in (0, stat.S_IFREG):
        return ""
    return "is a link in the zip file" if stat.S_ISLNK(mode) else f"is {kind_of_node(mode)} in the zip file"


def _why_not_unpacked(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & 0x1:
        return "it is encrypted in the zip file"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"its compression in the zip file, method {info.compress_type}, is not read; make the zip with deflate"
    if info.file_size > MAX_FILE_BYTES or info.compress_size > MAX_FILE_BYTES:
        return f"it has {info.file_size} bytes unpacked, but at most {MAX_FILE_BYTES} are read of a file"
    return ""


def _root_of(names: list[str]) -> str:
    """Return the folder (ending in ``/``) whose subfolders hold all images; empty where it is the zip file itself."""
    images = [name for name in names if name.lower().endswith(image_suffixes()) and not is_litter(name)]
    root = ""
    while images:
        below = [name.removeprefix(root).split("/") for name in images]
        if len({parts[0] for parts in below}) > 1 or any(len(parts) < 3 for parts in below):
            break
        root += f"{below[0][0]}/"
    return root
