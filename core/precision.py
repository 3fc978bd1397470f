"""Control whether devices compute float32 in full precision."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# PyTorch warns against its old settings, which its own compiler still reads; this file sets old and new ones alike.
warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32 behavior")


def allow_tf32(is_allowed: bool) -> None:
    """Allow or forbid GPUs to compute float32 matrix products and convolutions in TF32.

    This uses PyTorch's old settings: its compiler reads them, and raises where the new ones disagree.
    """
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    torch.backends.cudnn.allow_tf32 = is_allowed


def exact_device(device: torch.device) -> torch.device:
    """Return the device for networks that compute a few images at a time in float32: a GPU, else the CPU.

    XLA devices are not used: a TPU multiplies float32 as bfloat16 by default, and with several hosts a program runs on
    all of them at once, while each host has different images.
    """
    return device if device.type == "cuda" else torch.device("cpu")


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Disable autocast, and TF32 and bfloat16 in float32 convolutions and matrix products, inside the block.

    PyTorch has old and new settings for this, and some CUDA kernels raise where they disagree. So both are set, and
    both are restored, whichever of them the caller had used.
    """
    backends: Any = torch.backends
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    old_way = torch.get_float32_matmul_precision()  # read only now, since this raises too where the two disagree
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(old_way)
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
