"""Write the index of a folder of shards, and check it against the manifest when it is read.

``index.npz`` has everything. Nearly all of it is the names of images, so ``labels.npz`` repeats the other arrays:
training reads that file alone. Folders of earlier versions do not have it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.npz import read_npz, write_npz
from core.reading import DamagedFileError
from data.manifest import EMPTY_CAPTION_NAME, MAX_SOURCE_ID, Manifest
from data.shard_tars import Layout

INDEX_NAME = "index.npz"
LABELS_NAME = "labels.npz"
_LARGEST_CHARACTER = 0x10FFFF


class IndexFile(NamedTuple):
    """A file with labels and layouts, and what the manifest says of it."""

    name: str
    sha256: str
    max_bytes: int


class ShardIndex(NamedTuple):
    """The parts of the index that training reads."""

    labels: NDArray[np.integer]  # [num_samples] int32, or int64 where another program wrote them
    layouts: list[Layout]  # of each shard


def index_file(manifest: Manifest) -> IndexFile:
    """Return ``index.npz``."""
    return IndexFile(INDEX_NAME, manifest.index_sha256, manifest.max_index_bytes)


def labels_file(manifest: Manifest) -> IndexFile:
    """Return the smallest file with labels and layouts: ``labels.npz``, or ``index.npz`` of an earlier version."""
    if manifest.labels_sha256 is None:
        return index_file(manifest)
    return IndexFile(LABELS_NAME, manifest.labels_sha256, manifest.max_labels_bytes)


def empty_caption_file(manifest: Manifest) -> IndexFile | None:
    """Return ``empty_caption.npz``, or None where no text encoder was given."""
    tokens = manifest.captions and manifest.captions.tokens
    if not tokens:
        return None
    return IndexFile(EMPTY_CAPTION_NAME, tokens.empty_sha256, tokens.encoder.max_empty_bytes)


def write_index(folder: Path, labels: Sequence[int], source_ids: Sequence[str], layouts: Sequence[Layout]) -> None:
    """Write ``index.npz`` and ``labels.npz``; equal values give equal bytes."""
    label, layout = np.array(labels, dtype=np.int32), np.array(layouts, dtype=np.int64)
    write_npz(folder / INDEX_NAME, {"label": label, "source_id": np.array(source_ids), "layout": layout})
    write_npz(folder / LABELS_NAME, {"label": label, "layout": layout})


def read_index(content: bytes, manifest: Manifest, name: str) -> ShardIndex:
    """Return labels and layouts of either file, which has this content; errors call it ``name``.

    Raises DamagedFileError where they contradict the manifest: another number of samples, a label that is not a class,
    or samples that would lie outside their shard.
    """
    arrays = read_npz(content, name, ("label", "layout"))
    labels, layouts = arrays["label"], arrays["layout"]
    _require(labels, "label", (manifest.num_samples,), name)
    _require(layouts, "layout", (len(manifest.shards), 2), name)
    _require_labels(labels, manifest, name)
    index = ShardIndex(labels, [Layout(offset, stride) for offset, stride in layouts.tolist()])
    for shard, layout in zip(manifest.shards, index.layouts, strict=True):
        if not layout.fits(shard.count, manifest.spec, shard.bytes):
            raise DamagedFileError(
                f"{name} is damaged: {shard.count} samples of {manifest.spec.sample_bytes} bytes from byte "
                f"{layout.offset} on, {layout.stride} apart, are not within the {shard.bytes} bytes of {shard.name}."
            )
    return index


def read_source_ids(content: bytes, manifest: Manifest, name: str) -> NDArray[np.str_]:
    """Return the name of each row's image in its source, [num_samples]. Raises as `read_index` does."""
    source_ids: NDArray[np.str_] = read_npz(content, name, ("source_id",))["source_id"]
    if source_ids.dtype.kind != "U" or source_ids.dtype.byteorder == ">" or source_ids.shape != (manifest.num_samples,):
        raise _unlike("source_id", source_ids, f"text[{manifest.num_samples}]", name)
    if source_ids.dtype.itemsize > 4 * MAX_SOURCE_ID or source_ids.view("<u4").max(initial=0) > _LARGEST_CHARACTER:
        raise DamagedFileError(f"{name} is damaged: source_id holds values that are not text.")
    return source_ids


def _require_labels(labels: NDArray[np.integer], manifest: Manifest, name: str) -> None:
    num_classes = manifest.spec.num_classes
    if labels.min() < 0 or labels.max() >= num_classes:  # before arrays as large as the labels are made
        row = np.flatnonzero((labels < 0) | (labels >= num_classes))[0]
        raise DamagedFileError(
            f"{name} is damaged: sample {row} has label {labels[row]}, but the manifest has {num_classes} classes."
        )


def _require(array: NDArray[np.integer], member: str, shape: tuple[int, ...], name: str) -> None:
    if array.dtype not in (np.int32, np.int64) or array.shape != shape:
        raise _unlike(member, array, f"integers{list(shape)}", name)


def _unlike(member: str, array: NDArray[np.generic], expected: str, name: str) -> DamagedFileError:
    return DamagedFileError(f"{name} is damaged: {member} is {array.dtype}{list(array.shape)}, not {expected}.")
