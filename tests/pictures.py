"""Make images and small autoencoders for tests."""

import io
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
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


def make_vq(folder: Path, norm_type: str = "group", scale: float = 0.18215) -> Path:
    """Write a diffusers ``VQModel`` with random weights, factor 2, 3 channels and 32 codes."""
    torch.manual_seed(0)
    network = VQModel(
        block_out_channels=(32, 32) if norm_type == "spatial" else (8, 16),  # normalizing by codes needs groups of 32
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=32,
        norm_num_groups=4,
        norm_type=norm_type,
        scaling_factor=scale,
    )
    network.quantize.embedding.weight.data.normal_(std=0.5)
    network.save_pretrained(folder)
    return folder


def make_dc(folder: Path, channels: int = 32, scale: float = 0.5) -> Path:
    """Write a diffusers ``AutoencoderDC`` with random weights and factor 32."""
    torch.manual_seed(0)
    stages = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (
            ("block_types", ("ResBlock",) * 5 + ("EfficientViTBlock",)),
            ("block_out_channels", (8, 8, 8, 16, 32, channels)),
            ("layers_per_block", (1,) * 6),
            ("qkv_multiscales", ((),) * 5 + ((5,),)),
        )
    }
    AutoencoderDC(latent_channels=channels, attention_head_dim=4, scaling_factor=scale, **stages).save_pretrained(
        folder
    )
    return folder


def make_tiny(folder: Path) -> Path:
    """Write a diffusers ``AutoencoderTiny`` with random weights, 16 channels and factor 4."""
    torch.manual_seed(0)
    widths, blocks = (8, 8, 8), (1, 1, 1)
    AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        latent_channels=16,
    ).save_pretrained(folder)
    return folder
