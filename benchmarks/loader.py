"""Samples per second of the mapped loader against webdataset's streaming loader, on the same shards.

``python -m benchmarks.loader`` writes random 32x32x4 moments in both orientations to a temporary folder, reads
them both ways in one process, and prints one JSON line.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor

from data.batches import TrainingBatches
from data.encode import encode
from data.prefetch import prefetch
from data.shards import MappedShards
from data.sources import Example

SAMPLES, BATCH_SIZE, SECONDS = 2048, 256, 5.0


class RandomImages:
    """Random 32x32 images; `FourChannels` makes latents of the usual shape of them."""

    name, fingerprint = "random", "0"
    class_names = [str(number) for number in range(1000)]  # noqa: RUF012

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Example:
        image = np.random.default_rng(index).integers(0, 256, (32, 32, 1), dtype=np.uint8)
        return Example(str(index), image, index % 1000)


class FourChannels:
    """Stands for a VAE: four channels of mean and of log-variance, drawn from like one."""

    name, revision, downscale, channels, scale = "random", "0", 1, 4, 0.18215

    def moments(self, images: Tensor) -> Tensor:
        return images.expand(-1, 8, -1, -1).contiguous()

    def draw(self, moments: Tensor, posterior: Tensor) -> Tensor:
        mean, log_variance = moments.float().chunk(2, dim=1)
        return (mean + torch.exp(0.5 * log_variance) * posterior) * self.scale

    def decode(self, latent: Tensor) -> Tensor:
        return latent


@contextmanager
def no_progress(*_: Any) -> Iterator[Any]:
    class Bar:
        def update(self, n: int = 1) -> None: ...

    yield Bar()


def samples_per_second(batches: Iterator[Any], size_of: Callable[[Any], int]) -> float:
    next(batches)
    started, count = time.perf_counter(), 0
    for batch in batches:
        count += size_of(batch)
        if (elapsed := time.perf_counter() - started) > SECONDS:
            return count / elapsed
    return count / (time.perf_counter() - started)


def streaming(folder: Path) -> Iterator[Any]:
    """Bare reading through webdataset: decode and stack, without any draws."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("moments.npy", "cls")
    return iter(dataset.batched(BATCH_SIZE).repeat(1000))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, autoencoder = Path(name), FourChannels()
        settings = {"image_size": 32, "flip": True, "samples_per_shard": 256, "batch_size": 64, "seed": 0}
        encode(RandomImages(), autoencoder, folder, progress=no_progress, **settings)  # type: ignore[arg-type]
        batches = TrainingBatches(
            MappedShards(folder),
            autoencoder,
            seed=0,
            batch_size=BATCH_SIZE,
            num_timesteps=1000,
            class_dropout=0.1,
            flip=True,
        )
        ours = samples_per_second(prefetch(batches.from_step(0, 10**6)), lambda batch: len(batch["latent"]))
        theirs = samples_per_second(streaming(folder), lambda batch: len(batch[0]))
    result = {
        "benchmark": "loader",
        "mapped_with_draws_samples_per_sec": round(ours),
        "webdataset_streaming_without_draws_samples_per_sec": round(theirs),
        "ratio": round(ours / theirs, 2),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
