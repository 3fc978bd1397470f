"""Write small IDX files, as MNIST's are, and say where Fashion-MNIST lies on this machine."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from data.idx import SPLITS
from launch.command.app import CONF

FASHION = Path(yaml.safe_load((CONF / "data/source/fashion_mnist.yaml").read_text(encoding="utf-8"))["root"])
needs_fashion = pytest.mark.skipif(
    not FASHION.is_dir(), reason=f"needs Fashion-MNIST in {FASHION}: apt-get install dataset-fashion-mnist"
)


def idx(values: NDArray[Any], magic: int | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    """Return an IDX file of bytes; ``magic`` and ``shape`` are what its header states where that is not so."""
    said = values.shape if shape is None else shape
    return struct.pack(f">{1 + len(said)}I", 0x0800 + values.ndim if magic is None else magic, *said) + values.tobytes()


def gray_images(count: int, size: int = 28, num_classes: int = 10, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return images [count, size, size] with a bright row that tells the class, and labels."""
    labels = (np.arange(count) % num_classes).astype(np.uint8)
    images = np.random.default_rng(seed).integers(0, 64, (count, size, size), dtype=np.uint8)
    images[np.arange(count), labels % size] += 190
    return images, labels


def write_split(
    folder: Path, split: str, images: NDArray[Any], labels: NDArray[Any], packed: bool = True, separator: str = "-"
) -> None:
    """Write the two files of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in (("images", images), ("labels", labels)):
        name = f"{SPLITS[split]}-{kind}{separator}idx{values.ndim}-ubyte"
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values), mtime=0))
        else:
            (folder / name).write_bytes(idx(values))
