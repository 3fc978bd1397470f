"""Map the samples of a folder or URL of shards, and address them by row."""

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.npy import LONGEST_HEADER, parse_header
from core.reading import DamagedFileError, remedied
from core.remote import DEFAULT_RETRY, Retry, is_remote, join
from core.samples import Reads
from data.cache import Cache
from data.caption_file import CaptionFile
from data.caption_tokens import CaptionTokens, EmptyCaption, read_empty_caption
from data.embedding_file import CaptionEmbeddings, embedding_offsets
from data.manifest import CAPTIONS_NAME, MANIFEST_NAME, TextSpec
from data.mapped_file import MappedFile, compiled_reads, fill_by_descriptor, fill_rows
from data.shard_files import LocalShardFiles, RemoteShardFiles, ShardFiles
from data.shard_index import empty_caption_file, index_file, labels_file, read_index, read_source_ids
from data.shard_tars import features_distance


class Places(NamedTuple):
    """The places of values in files: of samples in their shards, or of embeddings in the files beside these."""

    shards: NDArray[np.int64]  # [B], for embeddings those of the shards plus the number of shards
    offsets: NDArray[np.int64]  # [B], of the first byte

    def of(self, part: slice) -> "Places":
        """Return some of the places."""
        return Places(self.shards[part], self.offsets[part])


class MappedShards:
    """The samples of a folder or URL of shards, addressable by row; files are read sample by sample.

    ``cache`` stores the shards of a URL, and ``retry`` sets how they are fetched. Raises ValueError that names a file
    which is missing or does not have the size or (with ``verify_checksums``) the hash that the manifest states.
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
        file = labels_file(self.manifest)
        content = self._files.read(file)
        with remedied(self._files.repair):
            self.labels, self._layouts = read_index(content, self.manifest, join(place, file.name))
        self._places = np.array(self._layouts, dtype=np.int64)  # [shards, 2]
        self._of_embeddings = np.zeros((len(self._layouts), 2), np.int64)  # offsets in each mapped file: tokens, pooled
        self._first_rows = np.cumsum([0, *self.counts])
        self._views: dict[int, MappedFile] = {}  # by the numbers of files
        self._descriptors = np.full(len(self._files.files), -1, np.int32)  # of each view that is read by position
        self._expected: set[int] = set()
        self._distances: dict[int, int] = {}  # of each mapped shard, from the moments of a sample to its features

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def counts(self) -> list[int]:
        """Return the number of samples of each shard."""
        return [shard.count for shard in self.manifest.shards]

    @property
    def source_ids(self) -> NDArray[np.str_]:
        """Return the name of each row's image in its source, read on each call: training never needs them."""
        file = index_file(self.manifest)
        content = self._files.read(file)
        with remedied(self._files.repair):
            return read_source_ids(content, self.manifest, join(self.place, file.name))

    def captions_of(self, row: int) -> list[str]:
        """Return the captions of a row, at least one, read from their file on each call.

        Raises ValueError where the shards have no captions, and DamagedFileError where their file is damaged.
        """
        with remedied(self._files.repair):
            return self._captions.of_rows(row, row + 1)[0]

    def tokens_of(self, row: int) -> CaptionTokens:
        """Return token ids and mask [n, M] of the n captions of a row. Raises ValueError as `captions_of` does."""
        self._require_tokens()
        with remedied(self._files.repair):
            return self._captions.tokens_of_rows(row, row + 1)[0]

    def num_captions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of captions of each row, [B], at least 1. Raises ValueError as `captions_of` does."""
        with remedied(self._files.repair):
            begin, end = self._captions.numbers_of(rows)
        return end - begin

    def tokens_of_captions(self, rows: NDArray[np.int64], chosen: NDArray[np.int64]) -> CaptionTokens:
        """Return token ids and mask [B, M] of one caption of each row: ``chosen`` [B] numbers it within the row.

        Raises ValueError as `captions_of` does.
        """
        self._require_tokens()
        with remedied(self._files.repair):
            return self._captions.tokens_at(self._numbers(rows, chosen))

    def use_embeddings(self) -> TextSpec:
        """Return the encoder of the stored embeddings of captions, which are then fetched with their shards.

        From now on `require_room` counts them. Raises ValueError where there are none, or their files are damaged.
        """
        spec = self._require_tokens()
        if not self.manifest.embeddings:
            raise ValueError(
                f"The shards in {self.place} have no embeddings of captions; encode with text_embeddings=true into "
                "another data.shards, or embed captions while training."
            )
        _ = self._first_captions  # checks the files once
        return spec

    def embeddings_of(
        self, rows: NDArray[np.int64], chosen: NDArray[np.int64], out: CaptionEmbeddings | None = None
    ) -> CaptionEmbeddings:
        """Return the embedding of one caption of each row: ``chosen`` [B] numbers it within the row.

        It is written to ``out`` if given. Rows of remote shards that were not announced are slow to read, as `expect`
        says. Raises ValueError as `use_embeddings` does.
        """
        spec = self.use_embeddings()
        if out is None:
            out = CaptionEmbeddings.empty(len(rows), spec)
        with remedied(self._files.repair):
            numbers = self._numbers(rows, chosen)
            out.mask[:] = self._captions.mask_at(numbers)
        shards = self._shards_of(rows)
        files = shards + len(self._layouts)
        for file in set(files.tolist()):
            self._view(file)
        within = numbers - self._first_captions[shards]
        for first, values in zip(self._of_embeddings[shards].T, (out.tokens, out.pooled), strict=True):
            self.read(Places(files, first + within * _num_bytes(values.shape[1:])), values)
        return out

    def _numbers(self, rows: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of captions among those of all rows."""
        begin, end = self._captions.numbers_of(rows)
        numbers = begin + chosen
        assert (chosen >= 0).all(), "a row's captions are numbered from 0"
        assert (numbers < end).all(), "a row has fewer captions"
        return numbers

    @cached_property
    def _first_captions(self) -> NDArray[np.int64]:
        """The number of each shard's first caption, once the files of embeddings are in use."""
        counts = np.array([file.count for file in self.manifest.embeddings], dtype=np.int64)
        ends, filled = np.cumsum(counts), np.flatnonzero(np.diff(self._first_rows))
        with remedied(self._files.repair):
            begin, _ = self._captions.numbers_of(self._first_rows[filled])
            _, end = self._captions.numbers_of(self._first_rows[filled + 1] - 1)
            if (begin != (ends - counts)[filled]).any() or (end != ends[filled]).any():
                raise DamagedFileError(
                    f"{join(self.place, MANIFEST_NAME)} is damaged: it says embeddings of other numbers of captions "
                    f"than {CAPTIONS_NAME} has."
                )
        self._files.use_embeddings()
        return ends - counts

    @property
    def empty_caption(self) -> EmptyCaption:
        """Return the embedding of the empty caption, read on each call. Raises ValueError where there is none."""
        spec, file = self._require_tokens(), empty_caption_file(self.manifest)
        assert file is not None
        content = self._files.read(file)
        with remedied(self._files.repair):
            return read_empty_caption(content, spec, join(self.place, file.name))

    def _require_tokens(self) -> TextSpec:
        captions = self.manifest.captions
        if captions is None or captions.tokens is None:
            raise ValueError(
                f"The shards in {self.place} have no token ids; encode images with captions and a data/text_encoder "
                "into another data.shards."
            )
        return captions.tokens.encoder

    @cached_property
    def _captions(self) -> CaptionFile:
        """The captions of all rows: their file is mapped when they are first needed."""
        if self.manifest.captions is None:
            raise ValueError(
                f"The shards in {self.place} have no captions; encode images with captions into another data.shards."
            )
        return CaptionFile(self._files.map_captions(), self.manifest, join(self.place, CAPTIONS_NAME))

    def labels_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the labels of rows, [len(rows)]."""
        return self.labels[rows].astype(np.int64, copy=False)

    def expect(self, shards: Iterable[int]) -> None:
        """Announce the shards that are read now and next, in this order; prefetch remote ones and release all others.

        Rows of other shards can still be read; a remote one then replaces the expected shards.
        """
        if self._files.keeps_all:
            return
        expected = list(dict.fromkeys(shards))
        self._expected = set(expected)
        views = self._views.items()
        self._keep_views({file: view for file, view in views if file % len(self._layouts) in self._expected})
        self._files.expect(expected)

    def map_places(self, places: Places) -> tuple[bool, Reads | None]:
        """Map the shards of local or announced places, so that they can be read in another way than by `read` alone.

        Return whether several threads may read there at once, and the compiled function by which `read` reads, or None
        where another does.
        """
        descriptors = self._descriptors[places.shards]
        shards = set(places.shards[descriptors < 0].tolist())  # those without one may be mapped all the same
        if not self._files.keeps_all and not self._expected.issuperset(shards):
            return False, None
        if shards:
            for shard in shards:
                self._view(shard)
            descriptors = self._descriptors[places.shards]
        return True, compiled_reads(descriptors, places.offsets, self._views)

    def require_room(self, num_shards: int, can_be_fewer: bool) -> None:
        """Raise ValueError where a cache cannot hold that many shards; it says whether another order needs fewer."""
        self._files.require_room(num_shards, can_be_fewer)

    def gather(
        self, rows: NDArray[np.int64], flips: NDArray[np.bool_], out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """Return moments [len(rows), 2c, h, w] float16 of rows, mirrored where ``flips``; write to ``out`` if given."""
        if out is None:
            out = np.empty((len(rows), *self.manifest.spec.sample_shape[1:]), dtype=np.float16)
        return self.read(self.places(rows, flips), out)

    def gather_features(
        self, rows: NDArray[np.int64], flips: NDArray[np.bool_], out: NDArray[np.float16]
    ) -> NDArray[np.float16]:
        """Write a teacher's features [len(rows), T, D] float16 to ``out``, of mirrored images where ``flips``."""
        return self.read(self.feature_places(rows, flips), out)

    def places(self, rows: NDArray[np.int64], flips: NDArray[np.bool_]) -> Places:
        """Return the places of the moments of rows, mirrored where ``flips``."""
        assert self.manifest.spec.flip or not flips.any(), "these shards have no mirrored images"
        shards = self._shards_of(rows)
        first, stride = self._places[shards].T
        of_one = _num_bytes(self.manifest.spec.sample_shape[1:])
        return Places(shards, first + (rows - self._first_rows[shards]) * stride + flips * of_one)

    def feature_places(self, rows: NDArray[np.int64], flips: NDArray[np.bool_]) -> Places:
        """Return the places of a teacher's features of rows, of mirrored images where ``flips``; map their shards."""
        teacher = self.manifest.teacher
        assert teacher is not None, "these shards have no features"
        shards, offsets = self.places(rows, np.zeros_like(flips))
        numbers = shards.tolist()
        for shard in numbers:
            self._view(shard)
        distances = np.array([self._distances[shard] for shard in numbers], dtype=np.int64)
        return Places(shards, offsets + distances + flips * _num_bytes((teacher.tokens, teacher.dim)))

    def read(self, places: Places, out: NDArray[np.float16]) -> NDArray[np.float16]:
        """Write the float16 values at each place to the rows of ``out``, and return it."""
        files, offsets = places
        views = self._views  # which stay open: those that are kept later are another dictionary
        filled = fill_by_descriptor(self._descriptors[files], offsets, out)
        del views  # a shard that is fetched below may need their room in a cache
        if filled < len(files):
            # One read per sample takes the same time for a few shards as for thousands.
            filled = fill_rows([self._view(file) for file in files.tolist()], offsets, out, filled)
        if filled < len(files):
            place = join(self.place, self._files.files[files[filled]].name)
            raise DamagedFileError(f"{place} was cut while this job ran; {self._files.repair}.")
        return out

    def close(self) -> None:
        """Release all shards and captions, and stop fetching."""
        self._keep_views({})
        for name in ("_captions", "_first_captions"):  # of cached properties
            self.__dict__.pop(name, None)
        self._files.close()

    def _shards_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._first_rows, rows, side="right") - 1

    def _keep_views(self, views: dict[int, MappedFile]) -> None:
        """Release all other views: their descriptors are closed when nothing reads them."""
        self._descriptors[list(self._views.keys() - views.keys())] = -1
        self._views = views

    def _view(self, file: int) -> MappedFile:
        if file not in self._views:
            shard, has_embeddings = file % len(self._layouts), file >= len(self._layouts)
            if shard not in self._expected:
                self.expect([shard])
            self._views[file] = self._mapped_embeddings(shard) if has_embeddings else self._mapped(shard)
            self._descriptors[file] = self._views[file].descriptor
        return self._views[file]

    def _mapped_embeddings(self, shard: int) -> MappedFile:
        """Return the file of a shard's embeddings, after checking its headers against the manifest."""
        entry = self.manifest.embeddings[shard]
        mapped = self._files.map(len(self._layouts) + shard)
        with remedied(self._files.repair):
            place = join(self.place, entry.name)
            self._of_embeddings[shard] = embedding_offsets(mapped, entry, self._require_tokens(), place)
        return mapped

    def _mapped(self, shard: int) -> MappedFile:
        """Return a shard, after checking the headers of the first and the last against the manifest."""
        layout, count = self._layouts[shard], self.manifest.shards[shard].count
        mapped, spec, teacher = self._files.map(shard), self.manifest.spec, self.manifest.teacher
        place = join(self.place, self.manifest.shards[shard].name)
        for row in {0, count - 1}:
            if not _begins(mapped, layout.offset + row * layout.stride, spec.sample_shape, spec.dtype):
                raise DamagedFileError(
                    f"{place} is not the shard that the index describes: there is no sample {spec.dtype}"
                    f"{spec.sample_shape} where {layout} puts sample {row}; {self._files.repair}."
                )
        if teacher is not None:
            with remedied(self._files.repair):
                distance = features_distance(mapped, layout, spec, place)
            for row in {0, count - 1}:
                offset, shape = layout.offset + row * layout.stride + distance, teacher.sample_shape(spec)
                if not _begins(mapped, offset, shape, spec.dtype):
                    raise DamagedFileError(
                        f"{place} has no features {spec.dtype}{shape} behind sample {row}, as the manifest says; "
                        f"{self._files.repair}."
                    )
            self._distances[shard] = distance
        return mapped


def _num_bytes(shape: tuple[int, ...]) -> int:
    """Return the bytes of float16 values."""
    return 2 * math.prod(shape)


def open_shards(place: str, verify_checksums: bool, cache: str, cache_bytes: int) -> MappedShards:
    """Return the shards of a folder, or those of a URL through a cache of ``cache_bytes`` in the folder ``cache``."""
    kept = Cache(Path(cache), cache_bytes) if is_remote(place) else None
    return MappedShards(place, verify_checksums, kept)


def _shard_files(place: Path | str, verify_checksums: bool, cache: Cache | None, retry: Retry) -> ShardFiles:
    if not is_remote(place):
        return LocalShardFiles(Path(place), verify_checksums)
    assert cache is not None, "shards behind a URL need a cache"
    return RemoteShardFiles(str(place), cache, verify_checksums, retry)


def _begins(mapped: MappedFile, offset: int, shape: tuple[int, ...], dtype: str) -> bool:
    """Return whether values of an array begin at ``offset``, right after a header of this shape and dtype."""
    start = mapped.rfind(b"\x93NUMPY", max(0, offset - LONGEST_HEADER), offset)
    if start < 0:
        return False
    try:
        header = parse_header(mapped[start:offset], "a shard", "a sample")
    except DamagedFileError:
        return False
    return (start + header.num_bytes, header.shape, header.dtype) == (offset, shape, dtype)
