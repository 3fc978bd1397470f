"""The memory that a plan states is what a training step really holds."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from core.batch import Batch
from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from model.dit import DiT, DiTConfig
from model.memory import saved_bytes, step_bytes
from runtime.accelerate import AccelerateRuntime
from train.ema import constant
from train.step import make_step


class Held(TorchDispatchMode):
    """Measures the most bytes that tensors hold at a time, beginning with those of ``tensors``."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most_bytes = 0
        for tensor in tensors:
            self._note(tensor)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in tree_iter(results):
            if isinstance(value, Tensor):
                self._note(value)
        self._storages = {key: value for key, value in self._storages.items() if not value[0].expired()}
        self.most_bytes = max(self.most_bytes, sum(size for _, size in self._storages.values()))
        return results


@pytest.mark.parametrize(("images", "at_log_step"), [(2, True), (24, False)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_holds_what_the_plan_says(precision: Any, images: int, at_log_step: bool) -> None:
    runtime = AccelerateRuntime(precision, device="cpu")
    model = DiT(DiTConfig(16, 4, 2, width=192, depth=3, num_heads=4, num_classes=10))
    averages, optimizer = constant(model, 0.999), torch.optim.AdamW(model.parameters())
    stepped, optimizer = runtime.prepare(model, [averages.module], optimizer)
    step = make_step(stepped, optimizer, averages, GaussianDiffusion(LinearSchedule(), LearnedRangeVariance()), runtime)
    x_0, noise = torch.randn(2, images, 4, 16, 16)
    batch = Batch(x_0, noise, torch.arange(images), {"label": torch.zeros(images, dtype=torch.int64)})
    step([batch])  # makes the optimizer's state
    moments = [value for state in optimizer.state.values() for value in state.values()]
    with Held([*model.parameters(), *averages.module.parameters(), *moments]) as held:
        step([batch], at_log_step=at_log_step)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    said = step_bytes(saved_bytes(model, precision == "bf16"), images, num_parameters)
    assert said == pytest.approx(held.most_bytes, rel=0.1)
    assert (said == 24 * num_parameters) == at_log_step
