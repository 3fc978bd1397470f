"""Train on TPUs through PyTorch/XLA's SPMD mode; virtual CPU devices run the same program.

A training step is traced into one graph and compiled once. For this, all state is created and its sharding annotated
before the first step, every value that changes from step to step is a tensor on the device, and gradients are dropped
or zero when the step ends. `runtime.choice` imports this file after it has set the environment.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch_xla
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch_xla.utils.checkpoint import checkpoint

from core.batch import Batch, mapped, micro_batches_of, require_divisible
from runtime.graph_adamw import GraphAdamW
from runtime.protocol import Metrics, Mode, Precision, Step, by_name
from runtime.sharding import Axes, sharding_of
from runtime.xla_devices import XlaDevices
from runtime.xla_layers import gather_where_used, trace_friendly


class XlaRuntime(XlaDevices):
    """Trains on the mesh of `XlaDevices`.

    ``mode`` selects the state that is sharded along the second axis, by the table in `runtime.sharding`: none
    (``replicated``); optimizer state and averages (``zero1``); these and the weights (``fsdp``, gathered where a layer
    uses them). Raises ValueError where ``fsdp_devices`` does not divide the number of devices.
    """

    def __init__(
        self,
        precision: Precision,
        mode: Mode = "replicated",
        fsdp_devices: int | None = None,
        micro_batches: int = 1,
        compilation_cache: str | None = None,
        timeout_sec: float = 600.0,
    ) -> None:
        super().__init__(precision, fsdp_devices, compilation_cache, timeout_sec)
        self._mode, self._micro_batches = mode, micro_batches

    def require_batch(self, batch_size: int) -> None:
        """Raise ValueError where a global batch does not divide into devices and micro-batches."""
        require_divisible(batch_size, self.num_devices, "devices", self._micro_batches)

    def prepare(
        self, model: nn.Module, averages: Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Shard the state by the mode. Raises ValueError for an optimizer other than AdamW."""
        axes = {} if self._mode == "replicated" else sharding_of(model, self._num_shards)
        on_host = dict(model.named_parameters())
        self._distribute(model, axes if self._mode == "fsdp" else {})
        for average in averages:
            self._distribute(average, axes)
        for module in (model, *averages):
            trace_friendly(module)
            if axes:
                gather_where_used(module, axes, self._state_mesh, self._batch_mesh)
        spread = partial(self._optimizer_state, axes=axes)
        return model, GraphAdamW.continuing(optimizer, on_host, model, spread, self._put, self._micro_batches > 1)

    def _optimizer_state(self, name: str, value: Tensor, axes: Mapping[str, Axes]) -> Tensor:
        return self._put(value, axes.get(name))

    def assign(self, scalar: Tensor, value: float) -> Tensor:
        """Return a new scalar: a change in place would make the old one an output of the next step's program."""
        return self._put(torch.tensor(value, dtype=scalar.dtype))

    def checkpoint(self, method: Callable[..., Any], owner: nn.Module, *arguments: Any) -> Any:
        """Apply PyTorch/XLA's activation checkpointing to ``method(owner, *arguments)``.

        The compiler would undo PyTorch's. The function must be a bound method, from which it takes the weights.
        """
        function, leaves, as_tree = flattened(method, owner, arguments)
        return as_tree(checkpoint(function, *leaves, preserve_rng_state=False))

    def feed(self, host_batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Send each batch while the previous step is computed, and yield its micro-batches."""
        for batch in host_batches:
            yield [mapped(part, self.put) for part in micro_batches_of(batch, self._micro_batches)]

    def step(self, function: Callable[..., Metrics]) -> Step:
        """Return the step as one that is traced and then executed asynchronously."""

        def run(micro_batches: Sequence[Batch], at_log_step: bool = True) -> Metrics:
            metrics = function(micro_batches)  # with the norm of the update: one program serves all steps
            torch_xla.sync()
            return metrics

        return run

    @contextmanager
    def _executed(self) -> Iterator[None]:
        yield
        torch_xla.sync()

    def micro_step(self, model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context that executes each of several micro-batches as one graph, which all of them share."""
        return nullcontext() if self._micro_batches == 1 else self._executed()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients, which XLA's partitioner sums over the devices that share the batch."""
        loss.backward()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale the whole gradients down to the global norm ``max_norm``, if given, and return the norm before."""
        trained = list(parameters)
        norm = self.norm([p.grad for p in trained if p.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm, foreach=False)
        return norm

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the Euclidean norm of the whole tensors, whatever their sharding."""
        return torch.nn.utils.get_total_norm(tensors, foreach=False)

    def fetch(self, history: Sequence[Metrics]) -> dict[str, list[float]]:
        """Return the metrics that the steps left on the device, in one transfer; nothing is compiled."""
        values = torch_xla._XLAC._xla_get_cpu_tensors([value for metrics in history for value in metrics.values()])
        return by_name(history, torch.stack(values).tolist())

    def copy_to_host(self, tensors: Mapping[str, Tensor], wanted: Container[str], host: dict[str, Tensor]) -> None:
        """Copy one tensor at a time, so that a device holds at most one whole tensor."""
        torch_xla.sync(wait=True)
        for name, value in tensors.items():
            if name in wanted or self.data_world > 1:  # with several hosts, gathering is collective
                whole = self._whole(value.detach())
                if name in wanted:
                    host[name] = whole


def flattened(
    method: Callable[..., Any], owner: nn.Module, arguments: tuple[Any, ...]
) -> tuple[MethodType, list[Any], Callable[[Any], Any]]:
    """Return ``method`` of ``owner`` as a bound method of leaves, the leaves, and a function from its result to a tree.

    The result of the bound method is one tensor, or a tuple of leaves.
    """
    leaves, inputs = tree_flatten(arguments)
    outputs: list[TreeSpec] = []

    def of_leaves(owner: nn.Module, *leaves: Any) -> Any:
        results, spec = tree_flatten(method(owner, *tree_unflatten(leaves, inputs)))
        outputs[:] = [spec]
        return results[0] if len(results) == 1 else tuple(results)

    def as_tree(results: Any) -> Any:
        return tree_unflatten(list(results) if isinstance(results, tuple) else [results], outputs[0])

    return MethodType(of_leaves, owner), leaves, as_tree
