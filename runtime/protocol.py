"""What jobs ask of a machine, in three parts that build on each other: `Processes`, `Devices`, `Runtime`.

Whoever takes a runtime names the smallest part that it needs, so a runtime that cannot train still makes references
and samples.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from core.batch import Batch, Denoiser

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Metrics = dict[str, Tensor]
Precision = Literal["fp32", "bf16"]  # of the network's forward and backward pass
Mode = Literal["replicated", "zero1", "fsdp"]  # spread over devices: nothing; optimizer and averages; weights too
Step = Callable[[Sequence[Batch]], Metrics]  # the micro-batches of one optimizer step -> scalars on the device


class Processes(Protocol):
    """The processes of a job, of which this is one. Enough for what each does alone and all merge: a reference.

    ``data_rank`` of ``data_world`` processes read data; ``is_main`` writes files. "Every process" below means that
    one which does not call makes the others wait for it.
    """

    device: torch.device  # where this process computes what it shares with no other: features, say
    is_main: bool
    data_rank: int
    data_world: int

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Raise ValueError where processes differ in a fact, naming it and both values. Every process must call it."""
        ...

    def together(self) -> AbstractContextManager[Any]:
        """In the block, an error or the death of one process stops the others within a minute, with its error."""
        ...

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows of all processes, concatenated in rank order on every one. Every process must call it."""
        ...

    def wait(self) -> None:
        """Return when every process has arrived."""
        ...


class Devices(Processes, Protocol):
    """Processes with places for tensors, which a network computes on together: enough for sampling and evaluation."""

    num_local_devices: int  # a process's rows of a batch are spread over so many devices

    def place(self, module: ModuleT) -> ModuleT:
        """Bring parameters and buffers of what is not trained to the device, whole."""
        ...

    def put(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch, from the host to its devices. Every process must put as many."""
        ...

    def rows(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch, on the host: the inverse of `put`. Every process must call it."""
        ...

    def parts(self, batch: Tensor, most: int) -> Sequence[Tensor]:
        """A batch on the devices in parts of ``most`` rows, each for `rows`; whole where devices share its rows."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The network's precision."""
        ...

    def inference(self, denoiser: Denoiser) -> Denoiser:
        """A denoiser as the runtime executes it inside a sampler."""
        ...


class Runtime(Devices, Protocol):
    """Processes and devices that train: what the loop and the step ask for."""

    def require_batch(self, batch_size: int) -> None:
        """Raise ValueError where a global batch does not divide into processes, devices and micro-batches."""
        ...

    def prepare(
        self, model: nn.Module, averages: Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Bring a model, the averages of its weights and its optimizer from the host to the devices.

        ``model`` and ``averages`` stay the modules that hold the state, possibly with new parameters in them.
        Returns the module to step with, whose gradients agree over all devices, and the optimizer that goes
        on from the state of the given one.
        """
        ...

    def checkpoint(self, method: Callable[..., Any], owner: nn.Module, *arguments: Any) -> Any:
        """``method(owner, *arguments)`` of trees of tensors, computed again in the backward pass instead of kept."""
        ...

    def feed(self, host_batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Host batches on the devices, in order, each as its micro-batches."""
        ...

    def step(self, function: Step) -> Step:
        """The training step as the runtime executes it."""
        ...

    def micro_step(self, model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of a micro-batch; gradients need to agree after the last one only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss, averaged over replicas."""
        ...

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale gradients down to a global norm of ``max_norm``, if given; returns the norm before, [] float32."""
        ...

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of all tensors together, whatever their sharding, [] float32."""
        ...

    def fetch(self, history: Sequence[Metrics]) -> dict[str, list[float]]:
        """The only host read of training: each step's means over replicas. Every process must call it."""
        ...

    def copy_to_host(self, tensors: Mapping[str, Tensor], wanted: Container[str], host: dict[str, Tensor]) -> None:
        """Copy the ``wanted`` tensors whole, whatever their sharding, over those in ``host``, or add them to it.

        Every process must call it, each with what it wants.
        """
        ...
