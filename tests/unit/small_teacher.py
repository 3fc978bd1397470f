"""Encode small images in both orientations with features of a small DINOv2, which has random weights."""

from pathlib import Path
from typing import Any

import torch
from conftest import PatternSource, silent_progress
from small_dinov2 import write_small_dinov2

from data.encode import encode
from data.encodings import EncodeImages
from data.images import ExactSize, Preparation
from data.teachers import DINOv2Teacher
from model.autoencoder import IdentityAutoencoder

TOKENS, DIM = 4, 32  # of 28 pixels in patches of 14


def small_teacher(folder: Path, image_size: int = 28) -> DINOv2Teacher:
    """Return a teacher with `TOKENS` tokens of `DIM` numbers, whose files are in ``folder``."""
    if not folder.exists():
        write_small_dinov2(folder)
    return DINOv2Teacher(str(folder), image_size)


def encode_with_teacher(folder: Path, teacher: DINOv2Teacher, flip: bool = True, **changes: Any) -> Any:
    """Encode the images of `PatternSource` to 4 shards."""
    encoding = EncodeImages(IdentityAutoencoder(1), Preparation(8, ExactSize()), flip, torch.device("cpu"), teacher)
    settings = {"name": "pattern", "samples_per_shard": 16, "batch_size": 7, "seed": 0} | changes
    return encode(PatternSource(), encoding, folder, progress=silent_progress, **settings)
