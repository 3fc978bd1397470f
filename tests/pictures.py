"""Make images and small autoencoders for tests."""

import io
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image


def photo(number: int, width: int = 40, height: int = 32) -> NDArray[np.uint8]:
    """Return a smooth color image, a different one for each number: [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width] / 10.0
    waves = [np.sin(x * (1 + number % 3) + number), np.cos(y + number * 0.7), np.sin(x + y - number)]
    return np.rint(127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def encoded(pixels: NDArray[np.generic], kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def make_image_folder(root: Path, per_class: int = 10, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """Write images ``root/CLASS/NUMBER.JPEG``, with the same names in all classes."""
    for label, class_name in enumerate(classes):
        (root / class_name).mkdir(parents=True)
        for number in range(per_class):
            pixels = photo(per_class * label + number, width=40 + number % 5)
            (root / class_name / f"{number:03d}.JPEG").write_bytes(encoded(pixels))
    return root


def make_autoencoder(folder: Path, channels: int = 4, seed: int = 0) -> Path:
    """Write a diffusers ``AutoencoderKL`` with random weights and factor 2, as `from_pretrained` reads it."""
    torch.manual_seed(seed)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(folder)
    return folder
