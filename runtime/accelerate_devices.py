"""Place tensors and run denoisers and decoders on the device of each accelerate process."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal

# accelerate selects XLA wherever torch_xla can be imported, even for cpu=True; this hides torch_xla from it.
os.environ["USE_TORCH_XLA"] = "0"

import accelerate
import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from core.batch import Denoiser
from core.precision import allow_tf32
from model.attend import attend_by, plain
from model.gelu import fused_hidden, has_fused_hidden, hide_by
from runtime.agreement import require_same
from runtime.allocator import keep_freed_memory
from runtime.launched import require_sound_environment
from runtime.protocol import ModuleT, Precision


class AccelerateDevices:
    """Processes with one device each; several under ``torchrun`` or ``accelerate launch``.

    ``tf32`` lets GPUs multiply float32 matrices in TF32; ``deterministic`` restricts them to kernels that give the
    same bits each time. A process that waits for another longer than ``timeout_sec`` stops.

    Raises ValueError where the requested device is absent or the launched processes do not see each other.
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
        self._precision = precision
        require_sound_environment()
        has_cuda = torch.cuda.is_available()
        if device == "cuda" and not has_cuda:
            raise ValueError(
                "runtime.device is cuda, but PyTorch sees 0 GPUs; install a driver or set runtime.device=auto."
            )
        AcceleratorState._reset_state(reset_partial_state=True)  # left by an earlier run in this process
        on_cpu = device == "cpu" or not has_cuda
        backend = "cuda:nccl,cpu:gloo" if "LOCAL_RANK" in os.environ and not on_cpu else None  # gloo sends numpy arrays
        self._accelerator = accelerate.Accelerator(
            cpu=on_cpu,
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout_sec))],
        )
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if on_cpu:
            keep_freed_memory()
        else:
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
        """Raise ValueError where processes differ in a fact, exchanged over the process group."""
        require_same(facts, lambda mine: gather_object([mine]))

    def together(self) -> AbstractContextManager[Any]:
        """Return an empty context: the launcher stops all processes when one ends with an error."""
        return nullcontext()

    def place(self, module: ModuleT) -> ModuleT:
        """Move a module to the device, and let it compute attention and MLPs by what is fastest there."""
        if self.device.type == "cpu" and self._precision == "bf16":
            attend_by(plain, module)
            if has_fused_hidden():
                hide_by(fused_hidden, module)
        return module.to(self.device)

    def put(self, rows: Tensor) -> Tensor:
        """Copy rows to the device, asynchronously on CUDA."""
        pinned = self.device.type == "cuda"
        return (rows.pin_memory() if pinned else rows).to(self.device, non_blocking=pinned)

    def rows(self, batch: Tensor) -> Tensor:
        """Copy this process's rows to the host."""
        return batch.cpu()

    def parts(self, batch: Tensor, most: int) -> Sequence[Tensor]:
        """Return views of at most ``most`` rows."""
        return batch.split(most)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the network's precision."""
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def inference(self, denoiser: Denoiser) -> Denoiser:
        """Return the denoiser unchanged."""
        return denoiser

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of all processes, concatenated; processes may have different numbers of rows."""
        return np.concatenate(gather_object([rows]))

    def wait(self) -> None:
        """Wait until every process has arrived."""
        self._accelerator.wait_for_everyone()


def _set_deterministic(is_deterministic: bool) -> None:
    """Restrict GPUs to kernels that give the same bits each time, or lift the restriction."""
    if is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch refuses matrix products without it
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False  # no code here reads uninitialized memory
    torch.use_deterministic_algorithms(is_deterministic)
