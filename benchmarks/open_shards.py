"""Measure how long a process takes to open the shards of 10 million samples, and the memory that this needs.

``python -m benchmarks.open_shards`` makes up an index for copies of one small shard, opens the folder in fresh
processes, with ``labels.npz`` and, as earlier versions did, with ``index.npz`` alone, and prints one JSON line. Imports
are not counted: time and memory are differences to a process that has imported everything.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.commit import current_commit
from benchmarks.loader import no_progress, processor
from core.npz import write_npz
from core.reading import sha256_of
from data.encode import encode
from data.encodings import EncodeImages
from data.images import ExactSize, Preparation
from data.manifest import Manifest
from data.shard_index import INDEX_NAME, LABELS_NAME
from data.sources import Example
from model.autoencoder import IdentityAutoencoder

SHARDS, SAMPLES_PER_SHARD, REPEATS = 4000, 2500, 5

OPEN = """
import json, sys, time
from pathlib import Path
import data.batches
from data.shards import MappedShards

def mib(*names):
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(names)) / 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
anonymous, resident = mib("RssAnon"), mib("VmRSS")
wall, processor = time.perf_counter(), time.process_time()
shards = MappedShards(sys.argv[1], verify_checksums=False)
found = {"wall_sec": time.perf_counter() - wall, "cpu_sec": time.process_time() - processor}
found |= {"kept_mib": mib("RssAnon") - anonymous, "peak_mib": mib("VmHWM") - resident}
print(json.dumps(found | {"samples": len(shards)}))
"""


class SmallImages:
    """A source of 2x2 images: the size of samples does not matter here."""

    name, fingerprint, block_sizes, left_out, notes = "small", "0", None, (), ()
    class_names = [str(number) for number in range(1000)]  # noqa: RUF012

    def __len__(self) -> int:
        return SAMPLES_PER_SHARD

    def __getitem__(self, index: int) -> Example:
        return Example(f"{index}", np.full((2, 2, 1), index % 251, dtype=np.uint8), index % 1000)


def write_shards(folder: Path) -> None:
    """Write a folder whose manifest lists copies of one shard."""
    encoding = EncodeImages(IdentityAutoencoder(1), Preparation(2, ExactSize()), False, torch.device("cpu"))
    settings: dict[str, Any] = {"name": "small", "samples_per_shard": SAMPLES_PER_SHARD, "batch_size": 250, "seed": 0}
    manifest = encode(SmallImages(), encoding, folder, progress=no_progress, **settings)
    assert manifest is not None
    (entry,) = manifest.shards
    entries = [replace(entry, name=f"shard-{number:06d}.tar") for number in range(SHARDS)]
    for copy in entries[1:]:
        os.link(folder / entry.name, folder / copy.name)
    with np.load(folder / LABELS_NAME, allow_pickle=False) as arrays:
        label, layout = (np.concatenate([arrays[name]] * SHARDS) for name in ("label", "layout"))
    names = np.array([f"n01440764/n01440764_{number:08d}.JPEG" for number in range(len(label))])
    write_npz(folder / LABELS_NAME, {"label": label, "layout": layout})
    write_npz(folder / INDEX_NAME, {"label": label, "source_id": names, "layout": layout})
    hashes = {"index_sha256": sha256_of(folder / INDEX_NAME), "labels_sha256": sha256_of(folder / LABELS_NAME)}
    replace(manifest, shards=entries, **hashes).save(folder)


def opened(folder: Path) -> dict[str, float]:
    """Return the medians of several fresh processes."""
    command = [sys.executable, "-c", OPEN, str(folder)]
    runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(REPEATS)]
    assert all(run.pop("samples") == SHARDS * SAMPLES_PER_SHARD for run in runs)
    return {name: round(float(np.median([run[name] for run in runs])), 3) for name in runs[0]}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder)
        result: dict[str, Any] = {"benchmark": "open_shards", "samples": SHARDS * SAMPLES_PER_SHARD, "shards": SHARDS}
        result["with_labels"] = opened(folder)
        replace(Manifest.load(folder), labels_sha256=None).save(folder)
        result["with_index_alone"] = opened(folder)
    result |= {"processor": processor(), "cores": os.cpu_count(), "numpy": np.__version__, "commit": current_commit()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
