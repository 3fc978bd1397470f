"""Compare samples per second of the mapped loader and of webdataset's streaming loader, on the same shards.

``python -m benchmarks.loader`` writes one shard of random 32x32x4 moments in both orientations, lists it 512 times
as the shards of a data set of ImageNet's size, and prints one JSON line. Everything runs on one core. Rates are
per second of processor time, which other programs on the machine affect little; rates per wall time are given too.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.commit import current_commit
from core.npz import write_npz
from core.prefetch import prefetch
from core.reading import sha256_of
from data.batches import TrainingBatches
from data.conditions import ClassLabels
from data.encode import encode
from data.encodings import EncodeImages
from data.images import ExactSize, Preparation
from data.order import GlobalOrder, Order, WindowedOrder, positions_of_step
from data.shard_index import INDEX_NAME, LABELS_NAME
from data.shards import MappedShards
from data.sources import Example
from diffusion.times import UniformSteps
from model.autoencoder import Autoencoder, IdentityAutoencoder
from model.autoencoder_kl import DiffusersAutoencoder

SHARDS, SAMPLES_PER_SHARD, BATCH_SIZE, SECONDS = 512, 2503, 256, 8.0
RESUMED_STEP = 1_000_000


class RandomImages:
    """A source of random 32x32 images, which `FourChannels` converts to moments of the usual shape."""

    name, fingerprint, block_sizes, left_out, notes = "random", "0", None, (), ()
    class_names = [str(number) for number in range(1000)]  # noqa: RUF012

    def __len__(self) -> int:
        return SAMPLES_PER_SHARD

    def __getitem__(self, index: int) -> Example:
        image = np.random.default_rng(index).integers(0, 256, (32, 32, 1), dtype=np.uint8)
        return Example(f"n01440764/n01440764_{index:05d}.JPEG", image, index % 1000)


class FourChannels(IdentityAutoencoder):
    """A stand-in for a VAE's encoder: four channels of mean and of log-variance."""

    def moments(self, images: Tensor) -> Tensor:
        return images.expand(-1, 8, -1, -1).contiguous()


def posterior_of_a_vae(folder: Path) -> DiffusersAutoencoder:
    """Return the autoencoder class of Stable Diffusion's VAE around a tiny network: only its `draw` is measured."""
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, latent_channels=4).save_pretrained(folder)
    return DiffusersAutoencoder("random", str(folder), scale=0.18215)


@contextmanager
def no_progress(*_: Any) -> Iterator[Any]:
    class Bar:
        def update(self, n: int = 1) -> None: ...

    yield Bar()


def write_shards(folder: Path) -> None:
    """Write a folder whose manifest lists one shard ``SHARDS`` times, under different names."""
    encoding = EncodeImages(FourChannels(4), Preparation(32, ExactSize()), True, torch.device("cpu"))
    settings = {"name": "random", "samples_per_shard": SAMPLES_PER_SHARD, "batch_size": 64, "seed": 0}
    manifest = encode(RandomImages(), encoding, folder, progress=no_progress, **settings)  # type: ignore[arg-type]
    assert manifest is not None
    (entry,) = manifest.shards
    entries = [replace(entry, name=f"shard-{number:06d}.tar") for number in range(SHARDS)]
    for copy in entries[1:]:
        (folder / copy.name).symlink_to(folder / entry.name)
    for index in (INDEX_NAME, LABELS_NAME):
        with np.load(folder / index, allow_pickle=False) as arrays:
            once = dict(arrays)
        write_npz(folder / index, {name: np.concatenate([array] * SHARDS) for name, array in once.items()})
    hashes = {"index_sha256": sha256_of(folder / INDEX_NAME), "labels_sha256": sha256_of(folder / LABELS_NAME)}
    replace(manifest, shards=entries, **hashes).save(folder)


def batches_of(shards: MappedShards, order: Order, autoencoder: Autoencoder) -> TrainingBatches:
    settings = {"seed": 0, "batch_size": BATCH_SIZE, "times": UniformSteps(1000), "class_dropout": 0.1, "flip": True}
    return TrainingBatches(shards, order, autoencoder, ClassLabels(1000), **settings)  # type: ignore[arg-type]


def mapped(shards: MappedShards, order: Order) -> Iterator[int]:
    """Read through memory maps alone, in the order of training, and yield the sizes of the batches."""
    flips = np.arange(BATCH_SIZE) % 2 == 0
    for step in range(RESUMED_STEP, 10**9):
        rows = order.rows_at(positions_of_step(step, BATCH_SIZE, 0, 1))
        yield len(shards.gather(rows, flips))


def streamed(folder: Path) -> Iterator[int]:
    """Read through webdataset alone, one file after the other, and yield the sizes of the batches."""
    urls = [str(folder / f"shard-{number:06d}.tar") for number in range(SHARDS)]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("moments.npy", "cls")
    for moments, _ in dataset.batched(BATCH_SIZE):
        yield len(moments)


def rates(sizes: Iterator[int]) -> dict[str, int]:
    """Measure samples per second of processor time and of wall time, and peak anonymous memory."""
    next(sizes)
    wall, processor, count, memory = time.perf_counter(), time.process_time(), 0, 0
    for size in sizes:
        count += size
        memory = max(memory, anonymous_mib())
        if time.process_time() - processor > SECONDS:
            break
    return {
        "samples_per_cpu_sec": round(count / (time.process_time() - processor)),
        "samples_per_wall_sec": round(count / (time.perf_counter() - wall)),
        "anonymous_mib": memory,
    }


def anonymous_mib() -> int:
    """Return this process's memory in MiB, without page cache."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) // 1024


def seconds_to_first_batch(folder: Path, autoencoder: Autoencoder, order: Callable[[list[int]], Order]) -> float:
    """Measure from opening the shards to the first batch of a resumed run, without imports and checksums."""
    started = time.perf_counter()
    shards = MappedShards(folder, verify_checksums=False)
    batches_of(shards, order(shards.counts), autoencoder).batch(RESUMED_STEP)
    return round(time.perf_counter() - started, 3)


ORDERS: dict[str, Callable[[list[int]], Order]] = {
    "global": lambda counts: GlobalOrder(0, counts),
    "windowed": lambda counts: WindowedOrder(0, counts, 8),
}


def measure(folder: Path) -> dict[str, Any]:
    """Return the results of one run of the benchmark."""
    autoencoder = posterior_of_a_vae(folder / "vae")
    first = {name: seconds_to_first_batch(folder, autoencoder, order) for name, order in ORDERS.items()}
    shards = MappedShards(folder, verify_checksums=False)
    ours: dict[str, dict[str, int]] = {}
    for name, order in ORDERS.items():
        batches = batches_of(shards, order(shards.counts), autoencoder)
        with closing(prefetch(batches.from_step(RESUMED_STEP, 10**9))) as host_batches:
            ours[name] = rates(len(batch.x_0) for batch in host_batches)
    reading = rates(mapped(shards, GlobalOrder(0, shards.counts)))
    theirs = rates(streamed(folder))
    return {
        "training_batches": ours,
        "mapped_reading_alone": reading,
        "webdataset_streaming_alone": theirs,
        "training_batches_per_streaming": _ratio(ours["global"], theirs),
        "mapped_per_streaming": _ratio(reading, theirs),
        "first_batch_at_step_1e6_sec": first,
    }


def _ratio(one: dict[str, int], other: dict[str, int]) -> float:
    return round(one["samples_per_cpu_sec"] / other["samples_per_cpu_sec"], 2)


def main() -> None:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    before = anonymous_mib()
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name))
        result = {"benchmark": "loader", "batch_size": BATCH_SIZE, "samples": SHARDS * SAMPLES_PER_SHARD}
        result |= measure(Path(name))
    result |= {
        "anonymous_mib_before": before,
        "load_average": round(os.getloadavg()[0], 1),  # over the last minute, to show other work on the machine
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": current_commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
