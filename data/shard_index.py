"""Write the index of a folder of shards, ``index.npz``, and check it against the manifest when it is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.npz import read_npz, write_npz
from core.reading import DamagedFileError
from data.manifest import MAX_SOURCE_ID, Manifest
from data.shard_tars import Layout

INDEX_NAME = "index.npz"
_LARGEST_CHARACTER = 0x10FFFF


class ShardIndex(NamedTuple):
    """The parts of the index that training reads."""

    labels: NDArray[np.int64]  # [num_samples]
    layouts: list[Layout]  # of each shard


def write_index(folder: Path, labels: Sequence[int], source_ids: Sequence[str], layouts: Sequence[Layout]) -> None:
    """Write ``index.npz``; equal values give equal bytes."""
    arrays = {
        "label": np.array(labels, dtype=np.int32),
        "source_id": np.array(source_ids),
        "layout": np.array(layouts, dtype=np.int64),
    }
    write_npz(folder / INDEX_NAME, arrays)


def read_index(content: bytes, manifest: Manifest, name: str) -> ShardIndex:
    """Return labels and layouts of an index with this content; errors call the index ``name``.

    Raises DamagedFileError where they contradict the manifest: another number of samples, a label that is not a class,
    or samples that would lie outside their shard.
    """
    arrays = read_npz(content, name, ("label", "layout"))
    labels, layouts = arrays["label"], arrays["layout"]
    _require(labels, "label", (manifest.num_samples,), name)
    _require(layouts, "layout", (len(manifest.shards), 2), name)
    index = ShardIndex(labels.astype(np.int64), [Layout(offset, stride) for offset, stride in layouts.tolist()])
    _require_labels(index.labels, content, manifest, name)
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


def _require_labels(labels: NDArray[np.int64], content: bytes, manifest: Manifest, name: str) -> None:
    bad = np.flatnonzero((labels < 0) | (labels >= manifest.spec.num_classes))
    if len(bad):
        image = read_source_ids(content, manifest, name)[bad[0]]
        raise DamagedFileError(
            f"{name} is damaged: the image {image} has label {labels[bad[0]]}, but the manifest has "
            f"{manifest.spec.num_classes} classes."
        )


def _require(array: NDArray[np.integer], member: str, shape: tuple[int, ...], name: str) -> None:
    if array.dtype not in (np.int32, np.int64) or array.shape != shape:
        raise _unlike(member, array, f"integers{list(shape)}", name)


def _unlike(member: str, array: NDArray[np.generic], expected: str, name: str) -> DamagedFileError:
    return DamagedFileError(f"{name} is damaged: {member} is {array.dtype}{list(array.shape)}, not {expected}.")
