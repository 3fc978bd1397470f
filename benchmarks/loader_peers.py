"""Other loaders of the same samples: ``np.memmap`` with PyTorch's DataLoader, webdataset, litdata, mosaicml-streaming.

Each function yields the sizes of its batches, without end. litdata and mosaicml-streaming are not among this project's
requirements; they are measured where they are installed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset

CHANNELS, SIDE = 4, 32
SHAPE = (2, 2 * CHANNELS, SIDE, SIDE)  # of a sample: both orientations


class MemoryMaps(Dataset[tuple[torch.Tensor, int]]):
    """Samples in raw files, each mapped by ``np.memmap``, in the order of a DataLoader that shuffles."""

    def __init__(self, files: list[Path], per_file: int) -> None:
        shape = (per_file, *SHAPE)
        self.files = [np.memmap(file, dtype=np.float16, mode="r", shape=shape) for file in files]
        self.per_file = per_file

    def __len__(self) -> int:
        return len(self.files) * self.per_file

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file, row = divmod(index, self.per_file)
        return torch.from_numpy(np.array(self.files[file][row, index % 2])), index % 1000


def memory_maps(files: list[Path], per_file: int, batch_size: int, normals: int, latents: bool) -> Iterator[int]:
    """Read with a DataLoader without workers; draw normals by ``torch.randn`` for noise and for posterior samples.

    ``normals`` counts these two; with ``latents`` posterior samples are computed too, as `TrainingBatches` does.
    """
    while True:
        for moments, _ in DataLoader(MemoryMaps(files, per_file), batch_size=batch_size, shuffle=True):
            shape = (len(moments), CHANNELS, SIDE, SIDE)
            drawn = [torch.randn(shape) for _ in range(normals)]
            if latents:
                mean, log_variance = moments.float().chunk(2, dim=1)
                _ = (mean + torch.exp(0.5 * log_variance) * drawn[0]) * 0.18215
                _ = torch.randint(0, 1000, (len(moments),)), torch.rand(len(moments)) < 0.1
            yield len(moments)


def webdatasets(tars: list[Path], batch_size: int) -> Iterator[int]:
    """Read tars through webdataset, one file after the other."""
    while True:
        dataset = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
        for moments, _ in dataset.decode().to_tuple("moments.npy", "cls").batched(batch_size):
            yield len(moments)


def litdatas(folder: Path, samples: np.ndarray, batch_size: int) -> Iterator[int]:
    """Write and read samples by litdata. Raises ImportError where it is not installed."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.cache import Cache

    folder.mkdir()
    cache = Cache(str(folder), chunk_bytes="64MB")
    for number, sample in enumerate(samples):
        cache[number] = {"moments": sample, "label": number % 1000}
    cache.done()
    cache.merge()
    while True:
        dataset = StreamingDataset(str(folder), shuffle=True)
        for batch in StreamingDataLoader(dataset, batch_size=batch_size, num_workers=0):
            yield len(batch["moments"])


def mosaics(folder: Path, samples: np.ndarray, batch_size: int) -> Iterator[int]:
    """Write and read samples by mosaicml-streaming. Raises ImportError where it is not installed."""
    from streaming import MDSWriter, StreamingDataset

    columns = {"moments": f"ndarray:float16:{','.join(map(str, SHAPE))}", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for number, sample in enumerate(samples):
            writer.write({"moments": sample, "label": number % 1000})
    dataset: Any = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    while True:
        for batch in DataLoader(dataset, batch_size=batch_size):
            yield len(batch["moments"])
