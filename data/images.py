"""Between images as people see them and as the network does."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_unit_range(images: NDArray[np.uint8]) -> Tensor:
    """[B, H, W, C] uint8 -> [B, C, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """[B, C, H, W] float in [-1, 1] -> [B, H, W, C] uint8, rounded as in the released sampling code."""
    levels = (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()
