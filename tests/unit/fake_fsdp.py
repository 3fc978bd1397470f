"""Test a step of two processes that shard their state over simulated GPUs; `test_fake_cuda.py` runs this file.

The process group is PyTorch's own fake, which sends nothing. DistributedDataParallel cannot run this way, since it
accesses the parameters' memory.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from fake_cuda import BLOCKS, CUDA, Training, Watch, host_batch, watch
from torch.distributed._tools import fake_collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

import runtime.accelerate

assert fake_collectives  # importing it says what the operations of a group give for fake tensors
__all__ = ["watch"]


@pytest.fixture(autouse=True)
def _group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Yield while this process is rank 0 of two."""
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }.items():
        monkeypatch.setenv(name, str(value))
    torch.distributed.init_process_group(backend="fake", rank=0, world_size=2, store=FakeStore())
    make_mesh = runtime.accelerate.init_device_mesh

    def mesh_of_numbers(*words: Any, **settings: Any) -> DeviceMesh:
        with _disable_current_modes():  # a mesh reads its own ranks
            return make_mesh(*words, **settings)

    monkeypatch.setattr(runtime.accelerate, "init_device_mesh", mesh_of_numbers)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_step_of_spread_state_makes_the_host_wait_for_nothing(watch: Watch, block: str) -> None:
    depth = 2 if block == BLOCKS[0] else 1  # of two, one is gathered while the other computes
    training = Training(block, recomputes=True, mode="fsdp", depth=depth)
    for number, micro_batches in enumerate(training.runtime.feed([host_batch(), host_batch()])):
        if number == 1:
            watch.waits.clear()
            watch.dtypes.clear()
        metrics = training.step(micro_batches)
    assert watch.waits == []
    assert torch.float64 not in watch.dtypes
    assert any("reduce_scatter" in name for name in watch.dtypes[torch.float32])  # gradients are exchanged
    assert {(value.device, value.dtype, value.dim()) for value in metrics.values()} == {(CUDA, torch.float32, 0)}
    assert {(type(value), value.device.type, value.dtype) for value in training.parameters() if value.dim()} == {
        (DTensor, "cuda", torch.float32)
    }
