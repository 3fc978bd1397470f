"""float32 that is float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def exact_device(device: torch.device) -> torch.device:
    """Where networks of a few images at a time compute in float32: a GPU, else the host.

    Not through XLA: a TPU multiplies float32 as bfloat16 by default, and with several hosts a program runs on all
    of them at once, while each sees images of its own here.
    """
    return device if device.type == "cuda" else torch.device("cpu")


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inside the block no TF32 in convolutions (PyTorch's default on GPUs) or matrix products, and no autocast."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    products = torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before
