"""Find the samples of one webdataset tar in one pass over its headers."""

import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from data.unread import LeftOut, compression, image_suffixes, is_litter, kind_of

MAX_LABEL = 10**6  # the largest label sets the number of classes, and so the size of the network's table
_LABEL_BYTES = 64  # largest size of a label
_SHOWN_MEMBERS = 4
_LOOK_BEHIND_BYTES = 2**16  # checked after the end of a tar, which is padded with at most 10 kB of zeros


class Member(NamedTuple):
    """One sample: the location of its content in a tar, and its label."""

    tar: str
    key: str
    offset: int  # bytes
    size: int  # bytes
    label: int
    caption: tuple[int, int] | None = None  # offset and size

    @property
    def source_id(self) -> str:
        """Return a name that is unique over all tars; two tars may use the same key."""
        return f"{self.tar}/{self.key}"


@dataclass
class _Found:
    """The headers of a tar, grouped by the keys of samples."""

    beside: str  # suffix of the member that each sample has: .cls, or that of captions
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and size
    labels: dict[str, int] = field(default_factory=dict)
    captions: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and size
    others: dict[str, list["_Other"]] = field(default_factory=lambda: defaultdict(list))


class _Other(NamedTuple):
    """A member that has another suffix than the samples, or is not a regular file."""

    name: str
    place: tuple[int, int] | None  # offset and size, if it is an image in another format that Pillow reads
    reason: str  # why it cannot be the sample; empty where it is not a candidate
    is_dotted: bool = False  # whether its name has several dots


def read_tar(
    file: Any, tar_name: str, suffixes: Sequence[str], caption: str | None = None
) -> tuple[list[Member], list[LeftOut]]:
    """Return the samples ``KEY.SUFFIX`` with labels ``KEY.cls`` of a tar, in order, and those left out.

    A key without such a sample may have an image in another format that Pillow reads. It is left out where its sample
    is a link, a device or in a format that is not read, or has several dots in its name, since the key ends at the
    first dot. Where the suffix of a ``caption`` is given, no label is read and each is 0, and samples without a caption
    and captions without a sample are left out. Raises ValueError that names the tar and the key where a label is
    missing or not a number, a key is duplicated, or the tar is damaged.
    """
    found = _Found(beside=caption or ".cls")
    for tar, info in _infos(file, tar_name):
        key, suffix = split_key(info.name)
        is_file = info.isreg() and not info.issparse()
        if info.isdir():
            continue
        if not is_file or (suffix != found.beside and suffix not in suffixes):
            if not is_litter(info.name.removeprefix("./")):
                found.others[key].append(_other(info, suffix, is_file, suffixes))
            continue
        if key in (found.labels if suffix == found.beside else found.places):
            raise ValueError(f"{tar_name} has {key}{suffix} twice; keys must be unique within a tar.")
        if suffix == caption:
            found.captions[key] = (info.offset_data, info.size)
            found.labels[key] = 0
        elif suffix == ".cls":
            content = tar.extractfile(info)
            assert content is not None
            found.labels[key] = _label(content.read(_LABEL_BYTES + 1), tar_name, key)
        else:
            found.places[key] = (info.offset_data, info.size)
    return _paired(found, tar_name)


def _infos(file: Any, tar_name: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members of a tar, after checking that each lies after the previous one and that none is missed."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            while (info := tar.next()) is not None:
                if info.size < 0 or tar.offset <= end:
                    raise tarfile.ReadError(f"{info.name} has a negative size")
                end = tar.offset
                yield tar, info
            _require_end(file, tar.offset)
    except (tarfile.TarError, EOFError, OverflowError, UnicodeError) as error:
        raise _unsound(file, tar_name, error) from error
    except ValueError as error:
        if tar_name in str(error):  # raised by a store, and names the file already
            raise
        raise _unsound(file, tar_name, error) from error


def _require_end(file: Any, offset: int) -> None:
    """Raise ReadError where more data follow: tarfile stops at the first end mark, or at a damaged header."""
    file.seek(offset)
    rest = file.read(_LOOK_BEHIND_BYTES)
    if any(rest[: tarfile.BLOCKSIZE]):
        raise tarfile.ReadError(f"the header at byte {offset} is damaged")
    for start in range(0, len(rest), tarfile.BLOCKSIZE):
        if rest[start + 257 : start + 262] == b"ustar":
            raise tarfile.ReadError(f"another tar begins at byte {offset + start}, after its end")


def _unsound(file: Any, tar_name: str, error: Exception) -> ValueError:
    file.seek(0)
    packed = compression(file.read(8))
    if packed == "zip":
        return ValueError(
            f"{tar_name} is a zip file; rename it to .zip, for data/source=image_folder data.source.root=....zip."
        )
    if packed:
        return ValueError(f"{tar_name} is compressed with {packed}, which cannot be read at random; unpack it.")
    return ValueError(f"{tar_name} is not a valid tar file ({error}); fetch or make it again.")


def _other(info: tarfile.TarInfo, suffix: str, is_file: bool, suffixes: Sequence[str]) -> _Other:
    last = f".{suffix.rpartition('.')[2]}"
    is_dotted = suffix.count(".") > 1 and (last in suffixes or last in image_suffixes())
    if not is_file:
        is_sample = suffix == ".cls" or suffix in suffixes or last in image_suffixes()
        return _Other(info.name, None, f"it is {_kind_of(info)} in the tar" if is_sample else "")
    if is_dotted:
        key = split_key(info.name)[0]
        reason = f"its name has several dots, but the key ends at the first, so that {key} is its key; rename it"
        return _Other(info.name, None, reason, is_dotted=True)
    if ".npy" not in suffixes and suffix in image_suffixes():
        return _Other(info.name, (info.offset_data, info.size), "")
    kind = kind_of(info.name)
    return _Other(info.name, None, kind.reason if kind and kind.is_image else "")


def _kind_of(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "a link, which `tar --dereference --hard-dereference` replaces by the file,"
    return "a sparse file" if info.issparse() else "a device or a pipe"


def _paired(found: _Found, tar_name: str) -> tuple[list[Member], list[LeftOut]]:
    left_out = []
    for key, others in found.others.items():
        if key in found.places:
            continue
        readable = next((other for other in others if other.place), None)
        if readable is not None and key in found.labels:
            found.places[key] = readable.place or (0, 0)
        elif unread := next((other for other in others if other.reason), None):
            left_out += [_left_out(tar_name, other) for other in others if other.reason and other.is_dotted]
            if not unread.is_dotted:
                left_out.append(_left_out(tar_name, unread))
            found.labels.pop(key, None)
        elif readable is not None:
            left_out.append(LeftOut(f"{tar_name}/{readable.name}", f"it has no {found.beside}", True))
    if found.beside == ".cls":
        _require_pairs(found, tar_name)
    odd = sorted(found.places.keys() ^ found.labels.keys())
    left_out += [_without_half(found, tar_name, key) for key in odd]
    members = [
        Member(tar_name, key, *place, found.labels[key], found.captions.get(key))
        for key, place in found.places.items()
        if key in found.labels
    ]
    return members, left_out


def _without_half(found: _Found, tar_name: str, key: str) -> LeftOut:
    if key in found.places:
        return LeftOut(f"{tar_name}/{key}", f"it has no {found.beside}, which should be its caption", True)
    return LeftOut(f"{tar_name}/{key}{found.beside}", "it is a caption without its image", True)


def _left_out(tar_name: str, other: _Other) -> LeftOut:
    return LeftOut(f"{tar_name}/{other.name}", other.reason, True)


def _require_pairs(found: _Found, tar_name: str) -> None:
    odd = sorted(found.places.keys() ^ found.labels.keys())
    if not odd:
        return
    key = odd[0]
    others = [PurePosixPath(other.name).name for other in found.others.get(key, [])]
    beside = f", but with {', '.join(others[:_SHOWN_MEMBERS])}" if others else ""
    if key in found.labels:
        raise ValueError(f"{tar_name} has {key} without its sample{beside}.")
    raise ValueError(
        f"{tar_name} has {key} without a .cls{beside}; labels are read only from KEY.cls, a whole number as text."
    )


def split_key(name: str) -> tuple[str, str]:
    """Return key and suffix of a member. The key ends at the first dot of the file name, as in webdataset."""
    path = PurePosixPath(name)
    stem, dot, rest = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, f"{dot}{rest}".lower()


def _label(content: bytes, tar: str, key: str) -> int:
    try:
        label = int(content)
    except ValueError as error:
        raise ValueError(f"{tar} has {key}.cls {content[:20]!r}, but a label is a whole number.") from error
    if label > MAX_LABEL:
        raise ValueError(f"{tar} has {key}.cls {label}, but labels run from 0 to {MAX_LABEL} at most.")
    return label
