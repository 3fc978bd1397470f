"""The device of each process of accelerate: where tensors lie, and what denoisers and decoders compute there."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal

# accelerate picks XLA wherever torch_xla can be imported, even for cpu=True; it must not know of it.
os.environ["USE_TORCH_XLA"] = "0"

import accelerate
import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from core.batch import Denoiser
from core.precision import allow_tf32
from runtime.agreement import require_same
from runtime.launched import require_sound_environment
from runtime.protocol import ModuleT, Precision


class AccelerateDevices:
    """One process a device; several under ``torchrun`` or ``accelerate launch``.

    ``tf32`` lets GPUs multiply float32 matrices in TF32; ``deterministic`` keeps them to kernels that give the same
    bits each time. A process that waits for another longer than ``timeout_sec`` stops.

    Raises ValueError where the asked device is absent or the launched processes do not see each other.
    """

    num_local_devices = 1

    def __init__(
        self,
        precision: Precision,
        device: Literal["auto", "cpu", "cuda"],
        num_threads: int | None,
        tf32: bool,
        deterministic: bool,
        timeout_sec: float,
    ) -> None:
        require_sound_environment()
        has_cuda = torch.cuda.is_available()
        if device == "cuda" and not has_cuda:
            raise ValueError(
                "runtime.device is cuda, but PyTorch sees 0 GPUs; install a driver or set runtime.device=auto."
            )
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process
        on_cpu = device == "cpu" or not has_cuda
        backend = "cuda:nccl,cpu:gloo" if "LOCAL_RANK" in os.environ and not on_cpu else None  # numpy goes over gloo
        self._accelerator = accelerate.Accelerator(
            cpu=on_cpu,
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout_sec))],
        )
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if not on_cpu:
            allow_tf32(tf32)
            _set_deterministic(deterministic)
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

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Over the process group."""
        require_same(facts, lambda mine: gather_object([mine]))

    def together(self) -> AbstractContextManager[Any]:
        """Nothing to do: the launcher ends all processes when one has ended with an error."""
        return nullcontext()

    def place(self, module: ModuleT) -> ModuleT:
        """Move to the device."""
        return module.to(self.device)

    def put(self, rows: Tensor) -> Tensor:
        """To the device, without waiting on CUDA."""
        pinned = self.device.type == "cuda"
        return (rows.pin_memory() if pinned else rows).to(self.device, non_blocking=pinned)

    def rows(self, batch: Tensor) -> Tensor:
        """To the host."""
        return batch.cpu()

    def parts(self, batch: Tensor, most: int) -> Sequence[Tensor]:
        """Views."""
        return batch.split(most)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 in the network where configured."""
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def inference(self, denoiser: Denoiser) -> Denoiser:
        """Itself."""
        return denoiser

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Concatenation over processes; they may have unequal numbers of rows."""
        return np.concatenate(gather_object([rows]))

    def wait(self) -> None:
        """A barrier."""
        self._accelerator.wait_for_everyone()


def _set_deterministic(is_deterministic: bool) -> None:
    """Keep GPUs to kernels that give the same bits each time, or not."""
    if is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch refuses matrix products
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False  # nothing here reads such memory
    torch.use_deterministic_algorithms(is_deterministic)
