"""Write the tar file of a shard with webdataset, and read it back as untrusted input.

A sample is ``{key}.cls`` (the label as text), ``{key}.moments.npy`` (float16 [orientations, 2c, h, w]) and, where a
teacher's features are stored, ``{key}.teacher.npy`` (float16 [orientations, T, D]) behind it. All samples have the same
size, so an offset and a stride locate each of them. Any webdataset reader opens these files; this module
reads plain USTAR files only: no links, devices, sparse files or extended headers.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from mmap import mmap
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import webdataset
from numpy.typing import NDArray

from core.atomic import atomic_file
from core.npy import LONGEST_HEADER, Header, parse_header
from core.reading import DamagedFileError, open_regular, sha256_of
from data.channel_sums import ChannelSums, channel_sums, total
from data.manifest import LatentSpec, ShardEntry, TeacherSpec

_BLOCK = 512  # bytes, of a tar
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_LABEL = re.compile(rb"\d{1,9}")
_MOST_LABEL_BYTES = 20
_NPY_HEADER = 128  # bytes that numpy writes before the values
CLS, MOMENTS, FEATURES = "cls", "moments.npy", "teacher.npy"  # suffixes of a sample's members, in webdataset's order
_CHUNK = 64  # samples in memory at a time


class Layout(NamedTuple):
    """The location of the float16 values of a shard's samples: offset and stride in bytes."""

    offset: int
    stride: int

    def fits(self, count: int, spec: LatentSpec, num_bytes: int) -> bool:
        """Return whether ``count`` samples of this layout do not overlap and lie within ``num_bytes``."""
        if count == 0:
            return self.offset >= 0 and self.stride >= 0
        apart = count == 1 or self.stride >= spec.sample_bytes
        last = self.offset + (count - 1) * self.stride
        return apart and self.offset >= 0 and self.stride >= 0 and last + spec.sample_bytes <= num_bytes


class Sample(NamedTuple):
    """One sample as the tar's headers describe it."""

    key: str
    label: int
    offset: int  # of the .npy file of moments, in bytes
    num_bytes: int
    features: "_Member | None" = None  # the .npy file of a teacher's features


def write_shard(
    path: Path,
    keys: Sequence[int],
    moments: NDArray[np.float16],
    labels: Sequence[int],
    features: Sequence[NDArray[np.float16]] | None = None,
) -> tuple[ShardEntry, Layout]:
    """Write samples as one tar, atomically; the same input gives the same bytes.

    ``moments`` is [num_samples, orientations, 2c, h, w]; ``features`` are a teacher's of each sample,
    [orientations, T, D], if any are stored.
    """
    # mtime=0: otherwise webdataset adds the time and an extended header of 1 KB to every member.
    with atomic_file(path) as file, webdataset.TarWriter(file, mtime=0) as writer:
        for number, (key, sample, label) in enumerate(zip(keys, moments, labels, strict=True)):
            more = {} if features is None else {FEATURES: features[number]}
            writer.write({"__key__": f"{key:08d}", MOMENTS: sample, CLS: label, **more})
    entry = ShardEntry(path.name, len(labels), path.stat().st_size, sha256_of(path))
    with open_regular(path) as tar:
        return entry, layout_of(tar, list(samples_of(tar, str(path))), str(path))


def shard_bytes_per_sample(num_values: int) -> int:
    """Return the bytes of a sample of ``num_values`` float16 in a tar: two tar headers, label, npy header, values."""
    return 2 * _BLOCK + array_bytes(num_values)


def array_bytes(num_values: int) -> int:
    """Return the bytes of an array of ``num_values`` float16 in a tar: tar header, npy header, values."""
    return _BLOCK + -(-(_NPY_HEADER + 2 * num_values) // _BLOCK) * _BLOCK


def samples_of(tar: IO[bytes], name: str) -> Iterator[Sample]:
    """Yield each sample of a tar, in order, without reading its values; errors call the tar ``name``.

    Raises DamagedFileError where the tar is truncated, or holds anything but a label and an array for each key.
    """
    members = _members(tar, name)
    first = next(members, None)
    while first is not None:
        second, third = next(members, None), next(members, None)
        (key, suffix), (other, other_suffix) = _split(first), _split(second) if second else ("", "")
        if second is None or key != other or {suffix, other_suffix} != {CLS, MOMENTS}:
            raise DamagedFileError(f"{name} is damaged: {first.name!r} is not half of a pair .cls and .moments.npy.")
        cls, array = (first, second) if suffix == CLS else (second, first)
        features = third if third is not None and _split(third) == (key, FEATURES) else None
        yield Sample(key, _label(tar, cls, name), array.offset, array.num_bytes, features)
        first = third if features is None else next(members, None)


def layout_of(tar: IO[bytes], samples: Sequence[Sample], name: str) -> Layout:
    """Return offset and stride as found in the file, independent of which program wrote the tar.

    Raises DamagedFileError where the distances between samples differ.
    """
    if not samples:  # none of the shard's images could be read
        return Layout(0, 0)
    offsets = [sample.offset for sample in samples]
    strides = set(np.diff(offsets).tolist()) or {0}
    if len(strides) != 1:
        raise DamagedFileError(f"{name} is damaged: its samples lie at {len(strides)} unequal distances.")
    first = _Member(samples[0].key, samples[0].offset, samples[0].num_bytes)
    return Layout(offsets[0] + _array_header(tar, first, name).num_bytes, strides.pop())


def values_of(tar: IO[bytes], sample: Sample, spec: LatentSpec, name: str) -> NDArray[np.float16]:
    """Return the moments of a sample. Raises DamagedFileError where their dtype or shape is not that of the spec."""
    array = _Member(sample.key, sample.offset, sample.num_bytes)
    return _values(tar, array, spec.sample_shape, spec, name, "a sample")


def features_of(
    tar: IO[bytes], sample: Sample, spec: LatentSpec, teacher: TeacherSpec, name: str
) -> NDArray[np.float16]:
    """Return a teacher's features of a sample. Raises DamagedFileError for none, or another shape."""
    if sample.features is None:
        raise DamagedFileError(f"{name} is damaged: the sample {sample.key!r} has no .{FEATURES} behind its moments.")
    return _values(tar, sample.features, teacher.sample_shape(spec), spec, name, "features")


def features_distance(content: bytes | mmap, layout: Layout, spec: LatentSpec, name: str) -> int:
    """Return the distance in bytes from a sample's first moment to its first feature, the same in a whole shard.

    The member with the features lies behind that with the moments. Raises DamagedFileError where there is no array.
    """
    end = layout.offset + spec.sample_bytes
    start = -(-end // _BLOCK) * _BLOCK + _BLOCK
    header = parse_header(content[start : start + LONGEST_HEADER], name, f"the .{FEATURES} of its first sample")
    return start + header.num_bytes - layout.offset


def _values(
    tar: IO[bytes], array: "_Member", shape: tuple[int, ...], spec: LatentSpec, name: str, what: str
) -> NDArray[np.float16]:
    header = _array_header(tar, array, name)
    if header.shape != shape or header.dtype != spec.dtype:
        raise DamagedFileError(f"{name} has {what} {header.dtype}{header.shape}, not {spec.dtype}{shape}.")
    if array.num_bytes != (expected := header.num_bytes + header.num_value_bytes):
        raise DamagedFileError(f"{name} is damaged: {what} has {array.num_bytes} bytes, not {expected}.")
    content = _read(tar, array.offset + header.num_bytes, header.num_value_bytes, name)
    return np.frombuffer(content, "<f2").reshape(shape)


class ShardFacts(NamedTuple):
    """Facts about a shard, computed from its own bytes."""

    labels: list[int]
    layout: Layout
    sums: ChannelSums | None


def facts_of(
    path: Path, spec: LatentSpec, count: int, with_sums: bool = True, teacher: TeacherSpec | None = None
) -> ShardFacts:
    """Return the labels, the layout and, with ``with_sums``, the sums of a shard of ``count`` samples.

    Raises OSError as `open` does, and DamagedFileError where the tar is damaged, has another number of samples, has a
    label that is not a class, has features though there is no ``teacher``, or (with ``with_sums``) a sample or its
    features of another shape or dtype or with non-finite values.
    """
    name = str(path)
    with open_regular(path) as tar:
        samples = list(islice(samples_of(tar, name), count + 1))
        if len(samples) != count:
            more = " or more" if len(samples) > count else ""
            raise DamagedFileError(f"{name} has {len(samples)} samples{more}, not {count}.")
        labels = [sample.label for sample in samples]
        if max(labels, default=0) >= spec.num_classes:
            raise DamagedFileError(f"{name} has the label {max(labels)}, but there are {spec.num_classes} classes.")
        layout = layout_of(tar, samples, name)
        if teacher is None and any(sample.features is not None for sample in samples):
            raise DamagedFileError(f"{name} has features of a teacher, but the manifest names none.")
        if with_sums and teacher is not None:
            _require_features(tar, samples, spec, teacher, name)
        return ShardFacts(labels, layout, _sums(tar, samples, spec, name) if with_sums else None)


def _require_features(
    tar: IO[bytes], samples: Sequence[Sample], spec: LatentSpec, teacher: TeacherSpec, name: str
) -> None:
    """Raise DamagedFileError unless each sample has the features of its teacher, finite and at the same distance."""
    distances = set()
    for sample in samples:
        values = features_of(tar, sample, spec, teacher, name)
        if not np.isfinite(values).all():
            raise DamagedFileError(f"{name} has {int((~np.isfinite(values)).sum())} features that are not finite.")
        assert sample.features is not None
        distances.add(sample.features.offset + sample.features.num_bytes - sample.offset)
    if len(distances) > 1:
        raise DamagedFileError(f"{name} is damaged: its features lie at {len(distances)} unequal distances.")


def _sums(tar: IO[bytes], samples: Sequence[Sample], spec: LatentSpec, name: str) -> ChannelSums:
    parts = []
    for start in range(0, len(samples), _CHUNK):
        values = np.stack([values_of(tar, sample, spec, name) for sample in samples[start : start + _CHUNK]])
        if not np.isfinite(values).all():
            raise DamagedFileError(f"{name} has {int((~np.isfinite(values)).sum())} values that are not finite.")
        parts.append(channel_sums(values, spec.channels))
    sums = total(parts, spec.channels)
    if not sums.is_finite:
        raise DamagedFileError(f"{name} has log-variances whose variance overflows.")
    return sums


class _Member(NamedTuple):
    name: str
    offset: int
    num_bytes: int


def _members(tar: IO[bytes], name: str) -> Iterator[_Member]:
    position = 0
    while any(header := _read(tar, position, _BLOCK, name)):
        checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if _number(header[148:156], name) != checksum:
            raise DamagedFileError(f"{name} is damaged: there is no valid tar header at byte {position}.")
        member = header[:100].rstrip(b"\0").decode("ascii", "backslashreplace")
        if header[156:157] not in (b"0", b"\0") or any(header[345:500]):
            raise DamagedFileError(f"{name} is damaged: its member {member!r} is not a plain file.")
        num_bytes = _number(header[124:136], name)
        yield _Member(member, position + _BLOCK, num_bytes)
        position += _BLOCK + -(-num_bytes // _BLOCK) * _BLOCK


def _split(member: _Member) -> tuple[str, str]:
    key, _, suffix = member.name.partition(".")
    return key, suffix


def _number(field: bytes, name: str) -> int:
    found = _OCTAL.fullmatch(field)
    if found is None:
        raise DamagedFileError(f"{name} is damaged: {field!r} is not a number of a tar header.")
    return int(found[1], 8)


def _label(tar: IO[bytes], member: _Member, name: str) -> int:
    content = _read(tar, member.offset, min(member.num_bytes, _MOST_LABEL_BYTES), name)
    if _LABEL.fullmatch(content) is None:
        raise DamagedFileError(f"{name} is damaged: {member.name} is {content!r}, which is not a label.")
    return int(content)


def _array_header(tar: IO[bytes], array: "_Member", name: str) -> Header:
    start = _read(tar, array.offset, min(array.num_bytes, LONGEST_HEADER), name)
    return parse_header(start, name, f"the sample {array.name!r}")


def _read(tar: IO[bytes], position: int, size: int, name: str) -> bytes:
    tar.seek(position)
    content = tar.read(size)
    if len(content) < size:
        raise DamagedFileError(f"{name} is damaged: it does not have {size} bytes at byte {position}.")
    return content
