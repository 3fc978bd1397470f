"""Define the interface between jobs and machines, in three parts that extend each other.

These are `Processes`, `Devices` and `Runtime`. Functions name the smallest part that they need, so a runtime that
cannot train can still compute references and samples.
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
AT_LOG_STEPS = frozenset({"param_norm", "update_norm"})  # metrics that read, or copy, all weights
Mode = Literal["replicated", "zero1", "fsdp"]  # sharded: nothing; optimizer state and averages; weights too


class Step(Protocol):
    """One optimizer step."""

    def __call__(self, micro_batches: Sequence[Batch], at_log_step: bool = True) -> Metrics:
        """Take the step; return scalars on the device.

        ``at_log_step`` says whether its metrics will be logged: else those of `AT_LOG_STEPS` may be left out.
        """
        ...


def by_name(history: Sequence[Metrics], values: Sequence[float]) -> dict[str, list[float]]:
    """Return the ``values`` of all metrics of all steps, in order, by the metrics' names. Steps may lack some names."""
    found: dict[str, list[float]] = {}
    names = (name for metrics in history for name in metrics)
    for name, value in zip(names, values, strict=True):
        found.setdefault(name, []).append(value)
    return found


class Processes(Protocol):
    """The processes of a job, of which this is one: enough for local work that is merged, such as a reference.

    This process reads data as rank ``data_rank`` of ``data_world``; the one that ``is_main`` writes files. Where a
    docstring says that every process must call, the others wait for a process that does not.
    """

    device: torch.device  # for this process's own computations, such as features
    is_main: bool
    data_rank: int
    data_world: int

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Raise ValueError where processes differ in a fact, naming it and both values. Every process must call it."""
        ...

    def together(self) -> AbstractContextManager[Any]:
        """Return a context in which the error or death of one process stops the others within a minute."""
        ...

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of all processes, concatenated in rank order. Every process must call it."""
        ...

    def wait(self) -> None:
        """Wait until every process has arrived."""
        ...


class Devices(Processes, Protocol):
    """Processes with devices that run a network together: enough for sampling and evaluation."""

    num_local_devices: int  # number of devices that share this process's rows of a batch

    def place(self, module: ModuleT) -> ModuleT:
        """Move a module that is not trained to the device, unsharded."""
        ...

    def put(self, rows: Tensor) -> Tensor:
        """Copy this process's rows of a batch to its devices. Every process must put the same number of rows."""
        ...

    def rows(self, batch: Tensor) -> Tensor:
        """Copy this process's rows of a batch to the host, the inverse of `put`. Every process must call it."""
        ...

    def parts(self, batch: Tensor, most: int) -> Sequence[Tensor]:
        """Split a batch on the devices into parts of ``most`` rows for `rows`; return it whole if devices share it."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the network's precision."""
        ...

    def inference(self, denoiser: Denoiser) -> Denoiser:
        """Return the denoiser as the runtime executes it inside a sampler."""
        ...


class Runtime(Devices, Protocol):
    """Processes and devices that train: the interface of the loop and the step."""

    def require_batch(self, batch_size: int) -> None:
        """Raise ValueError where a global batch does not divide into processes, devices and micro-batches."""
        ...

    def prepare(
        self, model: nn.Module, averages: Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move a model, the averages of its weights and its optimizer from the host to the devices.

        ``model`` and ``averages`` remain the modules that hold the state, possibly with new parameters. Return the
        module to step with, whose gradients agree on all devices, and the optimizer, which continues from the state
        of the given one.
        """
        ...

    def assign(self, scalar: Tensor, value: float) -> Tensor:
        """Return a scalar [] of the step with a new value: the same tensor if a step may have recorded its address."""
        ...

    def checkpoint(self, method: Callable[..., Any], owner: nn.Module, *arguments: Any) -> Any:
        """Return ``method(owner, *arguments)``, trees of tensors, and recompute it in the backward pass."""
        ...

    def feed(self, host_batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each host batch on the devices, in order."""
        ...

    def step(self, function: Callable[..., Metrics]) -> Step:
        """Return the training step as the runtime executes it."""
        ...

    def micro_step(self, model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch's passes; gradients need to agree only after the last micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss, averaged over replicas."""
        ...

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale gradients down to a global norm of ``max_norm``, if given, and return the norm before, [] float32."""
        ...

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the Euclidean norm of all tensors together, whatever their sharding, [] float32."""
        ...

    def fetch(self, history: Sequence[Metrics]) -> dict[str, list[float]]:
        """Return the means over replicas of each metric, of the steps that have it, in order.

        This is training's only read from devices. Every process must call it.
        """
        ...

    def copy_to_host(self, tensors: Mapping[str, Tensor], wanted: Container[str], host: dict[str, Tensor]) -> None:
        """Copy the ``wanted`` tensors, unsharded, over those in ``host``, or add them to it.

        Every process must call it; what they want may differ.
        """
        ...
