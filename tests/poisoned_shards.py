"""Write shards with one value that no encoder would write."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.order import GlobalOrder
from data.shard_tars import write_shard
from data.shards import MappedShards


def poisoned(shards_folder: Path, folder: Path, position: int, value: float = np.inf) -> str:
    """Copy shards so that the sample that ``position`` visits with seed 0 has one pixel of this value.

    The manifest is copied with them. Returns the image's name.
    """
    shutil.copytree(shards_folder, folder)
    shards = MappedShards(folder)
    row = int(GlobalOrder(0, shards.counts).rows_at(np.array([position]))[0])
    shard = int(np.searchsorted(np.cumsum(shards.counts), row, side="right"))
    rows = np.arange(shards.counts[shard]) + sum(shards.counts[:shard])
    moments = shards.gather(rows, np.zeros(len(rows), dtype=bool))
    moments[row - rows[0], 0, 3, 3] = value
    name, labels, manifest = str(shards.source_ids[row]), shards.labels[rows].tolist(), shards.manifest
    shards.close()
    entry, _ = write_shard(folder / manifest.shards[shard].name, rows.tolist(), moments[:, None], labels)
    entries = [entry if number == shard else old for number, old in enumerate(manifest.shards)]
    replace(manifest, shards=entries).save(folder)
    return name
