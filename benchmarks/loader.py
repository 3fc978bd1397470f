"""Compare samples per second of this loader and of others, on the same samples, interleaved.

``python -m benchmarks.loader`` writes one shard of random 32x32x4 moments in both orientations, lists it 512 times
as the shards of a data set of ImageNet's size, and prints one JSON line. Except for several threads, everything runs on
one core, with one thread (and the loader's own prefetch thread). Each row is measured in turn, several times, and its
median is printed: samples per second of processor time, which other programs on the machine affect little, and of wall
time. Each row is compared with the loader by both generators.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

import core.draws
from benchmarks.commit import current_commit
from benchmarks.loader_peers import CHANNELS, SHAPE, SIDE, litdatas, memory_maps, mosaics, webdatasets
from core.buffers import Buffers
from core.deferred import Deferred
from core.draws import Philox, Purpose, Streams, draw_choices
from core.fast_draws import FAST_DRAWS, load_draws
from core.latents import FAST_LATENTS
from core.npz import write_npz
from core.philox32 import FAST_PHILOX32, Philox32
from core.prefetch import DEPTH, prefetch
from core.reading import sha256_of
from core.samples import FAST_SAMPLES
from data.batches import TrainingBatches
from data.conditions import ClassLabels
from data.encode import encode
from data.encodings import EncodeImages
from data.images import ExactSize, Preparation
from data.mapped_file import FAST_READS
from data.order import GlobalOrder, Order, WindowedOrder, positions_of_step
from data.shard_index import INDEX_NAME, LABELS_NAME
from data.shards import MappedShards
from data.sources import Example
from diffusion.times import UniformSteps
from model.autoencoder import Autoencoder, IdentityAutoencoder
from model.autoencoder_kl import DiffusersAutoencoder

SHARDS, SAMPLES_PER_SHARD, BATCH_SIZE = 512, 2503, 256
ROUNDS, SECONDS = 5, 1.5  # for each row
RESUMED_STEP = 1_000_000
NEVER: Deferred[Any] = Deferred("draws", load_draws, worth=10**15)
OURS = {"philox32_v1": "ditscale, philox32_v1, global order", "numpy": "ditscale, numpy's bits, global order"}


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


def batches_of(
    shards: MappedShards,
    order: Order,
    autoencoder: Autoencoder,
    streams: Callable[[int], Streams] = Philox32,
    threads: int = 1,
) -> TrainingBatches:
    settings: dict[str, Any] = {"seed": 0, "batch_size": BATCH_SIZE, "class_dropout": 0.1, "flip": True}
    settings |= {"times": UniformSteps(1000), "threads": threads, "streams": streams}
    return TrainingBatches(shards, order, autoencoder, ClassLabels(1000), **settings)


def training_batches(
    shards: MappedShards, order: Order, autoencoder: Autoencoder, streams: Callable[[int], Streams]
) -> Iterator[int]:
    """Yield the sizes of the batches that training gets, from far into a run on."""
    batches = batches_of(shards, order, autoencoder, streams)
    with closing(prefetch(batches.from_step(RESUMED_STEP, 10**9))) as host_batches:
        for batch in host_batches:
            yield len(batch.x_0)


def reading_alone(shards: MappedShards, order: Order) -> Iterator[int]:
    """Read in the order of training, without draws."""
    flips = np.arange(BATCH_SIZE) % 2 == 0
    for step in range(RESUMED_STEP, 10**9):
        rows = order.rows_at(positions_of_step(step, BATCH_SIZE, 0, 1))
        yield len(shards.gather(rows, flips))


def draws_alone(kind: Callable[[int], Streams], compiled: bool = True) -> Iterator[int]:
    """Draw all random numbers of training, without reading."""
    streams, buffers, shape = kind(0), Buffers(), (2, BATCH_SIZE, CHANNELS * SIDE * SIDE)
    for step in range(RESUMED_STEP, 10**9):
        positions = positions_of_step(step, BATCH_SIZE, 0, 1)
        before, core.draws.FAST_DRAWS = core.draws.FAST_DRAWS, FAST_DRAWS if compiled else NEVER
        draw_choices(streams, positions, UniformSteps(1000), 0.1, True)
        normals = buffers.empty(shape, np.float32)
        streams.fill(normals[0], positions, Purpose.POSTERIOR, 0)
        streams.fill(normals[1], positions, Purpose.NOISE, 0)
        core.draws.FAST_DRAWS = before
        yield len(positions)


def rows_of(folder: Path, autoencoder: Autoencoder) -> dict[str, Iterator[int]]:
    """Return what is measured, by name."""
    shards = MappedShards(folder, verify_checksums=False)
    tars = [folder / shard.name for shard in shards.manifest.shards]
    files = raw_files(folder, shards)
    samples = np.concatenate([np.fromfile(files[0], np.float16).reshape(-1, *SHAPE)] * 4)
    global_order = GlobalOrder(0, shards.counts)
    windowed, by_window = MappedShards(folder, verify_checksums=False), WindowedOrder(0, shards.counts, 8)
    sizes = (files, SAMPLES_PER_SHARD, BATCH_SIZE)
    return {
        OURS["philox32_v1"]: training_batches(shards, global_order, autoencoder, Philox32),
        "ditscale, philox32_v1, windowed order": training_batches(windowed, by_window, autoencoder, Philox32),
        OURS["numpy"]: training_batches(shards, global_order, autoencoder, Philox),
        "ditscale, draws of philox32_v1 alone": draws_alone(Philox32),
        "ditscale, draws of numpy's bits alone": draws_alone(Philox),
        "ditscale, draws by numpy alone": draws_alone(Philox, compiled=False),
        "ditscale, reading alone": reading_alone(shards, global_order),
        "memmap + DataLoader + randn of noise and posterior, latents": memory_maps(*sizes, normals=2, latents=True),
        "memmap + DataLoader + randn of noise and posterior": memory_maps(*sizes, normals=2, latents=False),
        "memmap + DataLoader + randn of noise": memory_maps(*sizes, normals=1, latents=False),
        "memmap + DataLoader, reading alone": memory_maps(*sizes, normals=0, latents=False),
        "webdataset, reading alone": webdatasets(tars, BATCH_SIZE),
        "litdata, reading alone": litdatas(folder / "litdata", samples, BATCH_SIZE),
        "mosaicml-streaming, reading alone": mosaics(folder / "mosaic", samples, BATCH_SIZE),
    }


def raw_files(folder: Path, shards: MappedShards) -> list[Path]:
    """Write the samples of one shard without headers, and list the file as often as there are shards."""
    rows, count = np.arange(SAMPLES_PER_SHARD), SAMPLES_PER_SHARD
    both = [shards.gather(rows, np.full(count, flip)) for flip in (False, True)]
    np.stack(both, axis=1).tofile(folder / "raw-000000")
    files = [folder / f"raw-{number:06d}" for number in range(SHARDS)]
    for copy in files[1:]:
        copy.symlink_to(files[0])
    return files


def rate(sizes: Iterator[int], seconds: float) -> tuple[float, float]:
    """Return samples per second of processor time and of wall time."""
    settle()
    for _ in range(DEPTH + 2):  # batches that were prepared while another row was measured
        next(sizes)
    wall, processor, count = time.perf_counter(), time.process_time(), 0
    while time.process_time() - processor < seconds:
        count += next(sizes)
    return count / (time.process_time() - processor), count / (time.perf_counter() - wall)


def settle() -> None:
    """Wait until no thread of the row before works ahead any more."""
    used = 1.0
    while used > 0.02:
        before = time.process_time()
        time.sleep(0.2)
        used = time.process_time() - before


def interleaved(rows: dict[str, Iterator[int]]) -> dict[str, Any]:
    """Return the median of each row's rates."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    missing: dict[str, str] = {}
    for _ in range(ROUNDS):
        for name, sizes in rows.items():
            if name in missing:
                continue
            try:
                found[name].append(rate(sizes, SECONDS))
            except ImportError as error:
                missing[name] = f"not installed ({error.name})"
    medians = {name: np.median(pairs, axis=0) for name, pairs in found.items() if pairs}
    return missing | {
        name: {
            "samples_per_cpu_sec": round(cpu),
            "samples_per_wall_sec": round(wall),
            **{f"{kind}_per_this": round(medians[ours][0] / cpu, 2) for kind, ours in OURS.items()},
        }
        for name, (cpu, wall) in medians.items()
    }


def by_threads(folder: Path, autoencoder: Autoencoder, counts: Sequence[int]) -> dict[int, Any]:
    """Return the rates of several threads, on several cores, that make each batch.

    Other programs disturb wall time, so its best rate is returned.
    """
    shards = MappedShards(folder, verify_checksums=False)
    order = GlobalOrder(0, shards.counts)
    sizes = {count: sizes_of(batches_of(shards, order, autoencoder, threads=count)) for count in counts}
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for _ in range(2 * ROUNDS):
        for count in counts:
            found[count].append(rate(sizes[count], SECONDS))
    return {
        count: {
            "samples_per_cpu_sec": round(float(np.median([cpu for cpu, _ in rates]))),
            "most_samples_per_wall_sec": round(max(wall for _, wall in rates)),
        }
        for count, rates in found.items()
    }


def sizes_of(batches: TrainingBatches) -> Iterator[int]:
    return (len(batch.x_0) for batch in batches.from_step(RESUMED_STEP, 10**9))


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


def main() -> None:
    torch.set_num_threads(1)
    compiled: tuple[Deferred[Any], ...] = (FAST_DRAWS, FAST_PHILOX32, FAST_LATENTS, FAST_READS, FAST_SAMPLES)
    for functions in compiled:  # as they are after the first batches of a run
        assert functions.get(functions.worth) is not None
    cores = os.sched_getaffinity(0)
    before = anonymous_mib()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_shards(folder)
        autoencoder = posterior_of_a_vae(folder / "vae")
        result: dict[str, Any] = {
            "benchmark": "loader",
            "batch_size": BATCH_SIZE,
            "samples": SHARDS * SAMPLES_PER_SHARD,
            "philox32_v1_by_threads": by_threads(folder, autoencoder, range(1, len(cores) + 1)),
            "first_batch_at_step_1e6_sec": {
                name: seconds_to_first_batch(folder, autoencoder, order) for name, order in ORDERS.items()
            },
        }
        os.sched_setaffinity(0, {max(cores)})
        result["rows_on_one_core"] = interleaved(rows_of(folder, autoencoder))
    result |= {
        "anonymous_mib_before_and_after": [before, anonymous_mib()],
        "load_average": round(os.getloadavg()[0], 1),  # over the last minute, to show other work on the machine
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": current_commit(),
    }
    print(json.dumps(result))


def processor() -> str:
    """Return the processor's name, which is only in this file on Linux."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
