"""What the loop, the step and the evaluation ask of a machine."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.batch import Batch

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Step = Callable[[Batch], dict[str, Tensor]]


class Runtime(Protocol):
    """One process of a job. ``data_rank`` of ``data_world`` processes read data; ``is_main`` writes files."""

    device: torch.device
    is_main: bool
    data_rank: int
    data_world: int

    def place(self, module: ModuleT) -> ModuleT:
        """Move a module's parameters and buffers to the device."""
        ...

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and optimizer to step with, gradients averaged over replicas; the originals keep the state."""
        ...

    def feed(self, host_batches: Iterable[Batch]) -> Iterator[Batch]:
        """Host batches on the device, in order."""
        ...

    def step(self, function: Step) -> Step:
        """The training step as the runtime executes it."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The network's precision."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of a scalar loss, averaged over replicas."""
        ...

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale gradients down to a global norm of ``max_norm``; returns the norm before, [] float32."""
        ...

    def fetch(self, scalars: Mapping[str, Tensor]) -> dict[str, float]:
        """The only host read of training: scalars, averaged over replicas. Every replica must call it."""
        ...

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows of all processes, concatenated in rank order on every one. Every replica must call it."""
        ...

    def wait(self) -> None:
        """Return when every process has arrived."""
        ...

    def state_for_save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full, replica-independent copies on the host of the main process, nothing elsewhere.

        Every replica must call it.
        """
        ...
