"""Choose the device of the GPU tests: a GPU; without one, they are skipped.

``DITSCALE_GPU_TESTS_ON=cpu`` runs their bodies on the CPU, which finds mistakes in them before a GPU is available; it
proves nothing about GPUs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

# Before the first matrix product of this process, after which PyTorch does not look again.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from runtime.accelerate import AccelerateRuntime

DEVICE = torch.device(os.environ.get("DITSCALE_GPU_TESTS_ON", "cuda"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU, and these tests need one", allow_module_level=True)


def make_runtime(precision: Any = "fp32", **settings: Any) -> AccelerateRuntime:
    """Return a runtime on the device, with exact float32 unless ``settings`` say otherwise."""
    return AccelerateRuntime(
        precision, **{"device": DEVICE.type, "tf32": False, "compile": False, "cuda_graph": False, **settings}
    )


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise, within the block, at every operation that makes the host wait for the GPU."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def distance(one: Tensor, other: Tensor) -> float:
    """Return the relative distance of two tensors: the norm of the difference over the norm."""
    return ((one - other).norm() / other.norm()).item()
