"""CPU, one GPU, or data-parallel GPUs and nodes, through Hugging Face accelerate."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

# accelerate picks XLA wherever torch_xla can be imported, even for cpu=True; it must not know of it.
os.environ["USE_TORCH_XLA"] = "0"

import accelerate
import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffusion.batch import Batch
from runtime.protocol import ModuleT, Step


class AccelerateRuntime:
    """One process a device; several under ``torchrun`` or ``accelerate launch``.

    Raises ValueError where the asked device is absent, or the launched processes do not see each other.
    """

    def __init__(
        self,
        precision: Literal["fp32", "bf16"],
        device: Literal["auto", "cpu", "cuda"] = "auto",
        num_threads: int | None = None,
    ) -> None:
        has_cuda = torch.cuda.is_available()
        if device == "cuda" and not has_cuda:
            raise ValueError(
                "runtime.device is cuda, but PyTorch sees 0 GPUs; install a driver or set runtime.device=auto."
            )
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process
        on_cpu = device == "cpu" or not has_cuda
        self._accelerator = accelerate.Accelerator(
            cpu=on_cpu, mixed_precision="no" if precision == "fp32" else precision
        )
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.device = self._accelerator.device
        self.is_main = self._accelerator.is_main_process
        self.data_rank = self._accelerator.process_index
        self.data_world = self._accelerator.num_processes
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.data_world:
            raise ValueError(
                f"{launched} processes were launched, but accelerate sees {self.data_world}; "
                "start them with torchrun or `accelerate launch`, one per GPU."
            )

    def place(self, module: ModuleT) -> ModuleT:
        """Move to the device."""
        return module.to(self.device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap in DistributedDataParallel where there are several processes."""
        prepared: tuple[nn.Module, torch.optim.Optimizer] = self._accelerator.prepare(
            model, optimizer, device_placement=[False, False]
        )
        return prepared

    def feed(self, host_batches: Iterable[Batch]) -> Iterator[Batch]:
        """Copy each batch to the device, without waiting on CUDA."""
        pinned = self.device.type == "cuda"
        for batch in host_batches:
            yield Batch(
                latent=self._to_device(batch["latent"], pinned),
                label=self._to_device(batch["label"], pinned),
                t=self._to_device(batch["t"], pinned),
                noise=self._to_device(batch["noise"], pinned),
            )

    def _to_device(self, rows: Tensor, pinned: bool) -> Tensor:
        return (rows.pin_memory() if pinned else rows).to(self.device, non_blocking=pinned)

    def step(self, function: Step) -> Step:
        """Itself: eager execution."""
        return function

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 in the network where configured."""
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def backward(self, loss: Tensor) -> None:
        """Gradients, averaged over processes by DistributedDataParallel."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Global norm of the averaged gradients, which are scaled down to ``max_norm``."""
        return torch.nn.utils.clip_grad_norm_(list(parameters), max_norm)

    def fetch(self, scalars: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean over processes, then one copy to the host."""
        stacked = torch.stack([value.detach().float() for value in scalars.values()])
        values = self._accelerator.reduce(stacked, reduction="mean").tolist()
        return dict(zip(scalars, values, strict=True))

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Concatenation over processes; they may have unequal numbers of rows."""
        return np.concatenate(gather_object([rows]))

    def wait(self) -> None:
        """A barrier."""
        self._accelerator.wait_for_everyone()

    def state_for_save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the host of the main process; every replica has the full state."""
        if not self.is_main:
            return {}
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
