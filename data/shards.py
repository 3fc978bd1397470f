"""Shards: plain tar files of moments and labels, written with webdataset, read by mapping.

A sample is ``{key}.moments.npy`` (float16 [orientations, 2c, h, w]) and ``{key}.cls`` (the label as text).
Every member has the same size, so a sample is found by multiplication; ``index.npz`` says where the first
starts. Any webdataset reader opens the same files.
"""

import io
import mmap
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from numpy.typing import NDArray

from data.atomic import atomic_file
from data.cache import Cache
from data.manifest import LatentSpec, ShardEntry
from data.reading import sha256_of
from data.remote import DEFAULT_RETRY, Retry, is_remote
from data.shard_files import INDEX_NAME, LocalShardFiles, RemoteShardFiles, ShardFiles

__all__ = ["INDEX_NAME", "Layout", "MappedShards", "shard_bytes_per_sample", "write_index", "write_shard"]


class Layout(NamedTuple):
    """Where the float16 values of a shard's samples lie, in bytes."""

    offset: int
    stride: int


def write_shard(
    path: Path, keys: Sequence[int], moments: NDArray[np.float16], labels: Sequence[int]
) -> tuple[ShardEntry, Layout]:
    """Write samples as one tar, atomically; the same input gives the same bytes.

    ``moments`` is [n, orientations, 2c, h, w].
    """
    # mtime=0: webdataset would otherwise add a clock and an extended header of 1 KB to every member.
    with atomic_file(path) as file, webdataset.TarWriter(file, mtime=0) as writer:
        for key, sample, label in zip(keys, moments, labels, strict=True):
            writer.write({"__key__": f"{key:08d}", "moments.npy": sample, "cls": label})
    entry = ShardEntry(path.name, len(labels), path.stat().st_size, sha256_of(path))
    return entry, _layout_of(path)


def shard_bytes_per_sample(num_values: int) -> int:
    """Bytes that a sample of ``num_values`` float16 takes in a tar: two headers, the label, header and values."""
    block, npy_header = 512, 128
    return 3 * block + -(-(npy_header + 2 * num_values) // block) * block


def _layout_of(path: Path) -> Layout:
    """Read offset and stride back from the file, so that no assumption on the tar writer is needed."""
    with tarfile.open(path) as tar:
        starts, header = [], 0
        for member in tar:
            if member.name.endswith(".npy"):
                starts.append(member.offset_data)
                if not header:
                    content = tar.extractfile(member)
                    assert content is not None
                    np.lib.format.read_magic(content)
                    np.lib.format.read_array_header_1_0(content)
                    header = content.tell()
    if not starts:  # none of the shard's images could be read
        return Layout(0, 0)
    strides = set(np.diff(starts).tolist()) or {0}
    assert len(strides) == 1, f"members of {path.name} have unequal sizes"
    return Layout(starts[0] + header, strides.pop())


def write_index(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write an npz without clocks, so that equal arrays give equal bytes."""
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())


class MappedShards:
    """All samples of a folder or URL, addressable by row; files are mapped, not read.

    ``cache`` is where shards of a URL are kept, ``retry`` how they are asked for. Raises ValueError where a file
    is missing, has another size or (with ``verify_checksums``) another content than the manifest says, naming it.
    """

    def __init__(
        self,
        place: Path | str,
        verify_checksums: bool = True,
        cache: Cache | None = None,
        retry: Retry = DEFAULT_RETRY,
    ) -> None:
        self.place = place
        self._files = _shard_files(place, verify_checksums, cache, retry)
        self.manifest = self._files.manifest
        with self._index() as index:
            self.labels: NDArray[np.int64] = index["label"].astype(np.int64)
            self._layouts = [Layout(int(offset), int(stride)) for offset, stride in index["layout"]]
        self._require_labels()
        self._first_rows = np.cumsum([0, *self.counts])
        self._views: dict[int, NDArray[np.float16]] = {}
        self._expected: set[int] = set()

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [shard.count for shard in self.manifest.shards]

    @property
    def source_ids(self) -> NDArray[np.str_]:
        """Name of each row's image in its source, read anew: training never needs them."""
        with self._index() as index:
            return index["source_id"]

    def expect(self, shards: Iterable[int]) -> None:
        """Say which shards are read now and next, in this order: remote ones are fetched ahead, others let go.

        Rows of other shards can be read too; a remote one then takes the place of those expected.
        """
        if self._files.keeps_all:
            return
        expected = list(dict.fromkeys(shards))
        self._expected = set(expected)
        self._views = {shard: self._views[shard] for shard in expected if shard in self._views}
        self._files.expect(expected)

    def require_room(self, num_shards: int) -> None:
        """Raise ValueError where a cache cannot hold that many shards."""
        self._files.require_room(num_shards)

    def gather(
        self, rows: NDArray[np.int64], flips: NDArray[np.bool_], out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """Moments of the given rows, [len(rows), 2c, h, w] float16, mirrored where ``flips``; into ``out`` if given."""
        if out is None:
            out = np.empty((len(rows), *self.manifest.spec.sample_shape[1:]), dtype=np.float16)
        shards = np.searchsorted(self._first_rows, rows, side="right") - 1
        # One copy per sample: as fast for a few shards as for thousands.
        places = zip(shards.tolist(), (rows - self._first_rows[shards]).tolist(), flips.tolist(), strict=True)
        for sample, (shard, row, flip) in zip(out, places, strict=True):
            sample[...] = self._view(shard)[row, int(flip)]
        return out

    def close(self) -> None:
        """Let all shards go, and end fetching."""
        self._views = {}
        self._files.close()

    def _view(self, shard: int) -> NDArray[np.float16]:
        if shard not in self._views:
            if shard not in self._expected:
                self.expect([shard])
            layout = self._layouts[shard]
            self._views[shard] = _strided(self._files.map(shard), self.counts[shard], layout, self.manifest.spec)
        return self._views[shard]

    def _index(self) -> Any:
        return np.load(io.BytesIO(self._files.read_index()), allow_pickle=False)

    def _require_labels(self) -> None:
        num_classes = self.manifest.spec.num_classes
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(bad):
            raise ValueError(
                f"Sample {self.source_ids[bad[0]]} in {self.place} has label {self.labels[bad[0]]}, but the "
                f"manifest has {num_classes} classes; encode these images again."
            )


def _shard_files(place: Path | str, verify_checksums: bool, cache: Cache | None, retry: Retry) -> ShardFiles:
    if not is_remote(place):
        return LocalShardFiles(Path(place), verify_checksums)
    assert cache is not None, "shards behind a URL need a cache"
    return RemoteShardFiles(str(place), cache, verify_checksums, retry)


def _strided(mapped: mmap.mmap | np.memmap, count: int, layout: Layout, spec: LatentSpec) -> NDArray[np.float16]:
    """A read-only strided view [count, orientations, 2c, h, w] of a mapped tar."""
    inner = np.empty(spec.sample_shape, dtype=np.float16).strides
    return np.ndarray(
        shape=(count, *spec.sample_shape),
        dtype=np.dtype("<f2"),
        buffer=mapped,
        offset=layout.offset,
        strides=(layout.stride, *inner),
    )
