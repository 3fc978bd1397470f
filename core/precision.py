"""float32 that is float32."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# PyTorch's advice to leave its old settings, which its own compiler still reads: both are kept in agreement here.
warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32 behavior")


def allow_tf32(is_allowed: bool) -> None:
    """Whether GPUs may compute products and convolutions of float32 in TF32.

    Set in PyTorch's old way: its compiler reads that, and raises where the new one says something else.
    """
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    torch.backends.cudnn.allow_tf32 = is_allowed


def exact_device(device: torch.device) -> torch.device:
    """Where networks of a few images at a time compute in float32: a GPU, else the host.

    Not through XLA: a TPU multiplies float32 as bfloat16 by default, and with several hosts a program runs on all
    of them at once, while each sees images of its own here.
    """
    return device if device.type == "cuda" else torch.device("cpu")


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inside the block no TF32 or bfloat16 in convolutions or matrix products of float32, and no autocast.

    PyTorch has an old and a new way to set this, and some CUDA kernels raise where the two disagree. So both are set,
    and both are put back, whichever of them the caller had used.
    """
    backends: Any = torch.backends
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    old_way = torch.get_float32_matmul_precision()  # only now: it, too, raises where the two disagree
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(old_way)
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
