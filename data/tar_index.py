"""Samples of webdataset tars: where they lie, by one pass over the headers, then any of them by its offset."""

import hashlib
import json
import tarfile
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from braceexpand import braceexpand

from data.files import Files, given
from data.sources import Example

READ_AHEAD_BYTES = 4 * 2**20  # of a remote tar, whose headers lie among the images


class Member(NamedTuple):
    """One sample: its content's place in a tar, and its label."""

    tar: str
    key: str
    offset: int  # bytes
    size: int  # bytes
    label: int

    @property
    def source_id(self) -> str:
        """Unique over all tars; keys may come again in another tar."""
        return f"{self.tar}/{self.key}"


class TarIndex:
    """The samples ``KEY.SUFFIX`` with labels ``KEY.cls`` of every tar of ``tars``, in order.

    ``tars`` is a folder or, with its names in braces, a pattern as webdataset takes it
    (``s3://bucket/train-{0000..1023}.tar``). Raises ValueError that names the tar and the key where a label is
    missing or no number, a key comes twice, or a tar is damaged.
    """

    def __init__(self, tars: str, suffixes: Sequence[str]) -> None:
        folder, names = _folder_and_names(tars)
        self._files = Files(folder)
        names = names or self._files.with_suffix(".tar")
        if missing := [name for name in names if name not in self._files.sizes]:
            raise ValueError(f"{len(missing)} of {len(names)} tars are missing in {folder}, the first is {missing[0]}.")
        self.members = [member for name in names for member in self._members_of(name, suffixes)]
        if not self.members:
            raise ValueError(f"There are no samples ({', '.join(suffixes)}) in the {len(names)} tars of {tars}.")
        listing = [(name, self._files.sizes[name]) for name in names]
        self.fingerprint = hashlib.sha256(json.dumps([listing, list(suffixes)]).encode()).hexdigest()

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return max(member.label for member in self.members) + 1

    def read(self, member: Member) -> bytes:
        """A sample's content."""
        return self._files.read(member.tar, member.offset, member.offset + member.size)

    def _members_of(self, name: str, suffixes: Sequence[str]) -> list[Member]:
        places: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
        try:
            with self._files.open(name, READ_AHEAD_BYTES) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    key, suffix = _split(info.name)
                    if not info.isfile() or (suffix != ".cls" and suffix not in suffixes):
                        continue
                    if key in (labels if suffix == ".cls" else places):
                        raise ValueError(f"{name} has {key}{suffix} twice; keys must be unique within a tar.")
                    if suffix == ".cls":
                        content = tar.extractfile(info)
                        assert content is not None
                        labels[key] = _label(content.read(), name, key)
                    else:
                        places[key] = (info.offset_data, info.size)
        except tarfile.TarError as error:
            raise ValueError(f"{name} is no sound tar file ({error}); fetch or make it again.") from error
        if odd := sorted(places.keys() ^ labels.keys()):
            raise ValueError(f"{name} has {odd[0]} without {'a .cls' if odd[0] in places else 'its sample'}.")
        return [Member(name, key, offset, size, labels[key]) for key, (offset, size) in places.items()]


class TarSamples:
    """A `Source` of ``KEY.SUFFIX`` and ``KEY.cls`` in tars, local or at a URL; its classes say which suffixes.

    ``tars`` is a folder or a pattern with braces. Classes are numbers unless ``class_names`` are given.
    Raises ValueError as `TarIndex` does.
    """

    name: str
    suffixes: tuple[str, ...]
    block_sizes = None

    def __init__(self, tars: str | None, class_names: list[str] | None = None) -> None:
        self._index = TarIndex(given(tars, "tars"), self.suffixes)
        self.class_names = class_names or [str(number) for number in range(self._index.num_classes)]
        self.fingerprint = self._index.fingerprint

    def __len__(self) -> int:
        return len(self._index.members)

    def __getitem__(self, index: int) -> Example:
        member = self._index.members[index]
        return Example(member.source_id, self.decoded(self._index.read(member), member.source_id), member.label)

    def decoded(self, content: bytes, source_id: str) -> Any:
        """What an `Example` holds of a sample's bytes."""
        return content


def _folder_and_names(tars: str) -> tuple[str, list[str]]:
    """A pattern's folder and the names that it stands for; of a plain folder, no names."""
    if "{" not in tars and not tars.endswith(".tar"):
        return tars, []
    paths = list(braceexpand(tars))
    folders = {path.rpartition("/")[0] for path in paths}
    if len(folders) != 1:
        raise ValueError(f"{tars} names {len(folders)} folders, but the tars of a source lie in 1.")
    return folders.pop() or ".", [path.rpartition("/")[2] for path in paths]


def _split(name: str) -> tuple[str, str]:
    """Webdataset's convention: the key ends at the first dot of the file's name."""
    path = PurePosixPath(name)
    stem, dot, rest = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, f"{dot}{rest}".lower()


def _label(content: bytes, tar: str, key: str) -> int:
    try:
        return int(content)
    except ValueError as error:
        raise ValueError(f"{tar} has {key}.cls {content[:20]!r}, but a label is a whole number.") from error
