"""Train on a CPU, one GPU, or data-parallel GPUs and nodes, through Hugging Face accelerate."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import is_initialized
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from core.batch import Batch, mapped, micro_batches_of, require_divisible
from model.network import Network
from runtime.accelerate_devices import AccelerateDevices
from runtime.cuda_graph import GraphedStep
from runtime.kernels import WHERE_POSSIBLE, compile_network, fastest_form
from runtime.protocol import Metrics, Precision, Step, by_name


class AccelerateRuntime(AccelerateDevices):
    """Trains on `AccelerateDevices`, whose settings it takes too.

    ``mode`` replicated keeps the whole state on each device (DistributedDataParallel); fsdp shards weights, averages
    and optimizer state over all of them (FSDP2). ``compile`` compiles one unit of network and averages, which all equal
    units share; whole compiles the network as one graph; auto does the first on GPUs where the compiler that it needs
    is installed, where_possible also the second on a CPU, if it is replicated. ``cuda_graph`` replays a step as one
    CUDA graph (`GraphedStep`); auto does for a single process on a GPU.

    Raises ValueError as `AccelerateDevices` does, for fsdp where no processes were launched to shard over, for a
    whole graph under fsdp, and for a CUDA graph without a GPU or with several processes.
    """

    def __init__(
        self,
        precision: Precision,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        num_threads: int | None = None,
        mode: Literal["replicated", "fsdp"] = "replicated",
        micro_batches: int = 1,
        compile: Literal[True, False, "auto", "where_possible", "whole"] = "auto",
        cuda_graph: Literal[True, False, "auto"] = "auto",
        tf32: bool = True,
        deterministic: bool = False,
        timeout_sec: float = 600.0,
    ) -> None:
        super().__init__(precision, device, num_threads, tf32, deterministic, timeout_sec)
        self._mode, self._micro_batches = mode, micro_batches
        self._compile = self._chosen(compile) if compile in ("auto", WHERE_POSSIBLE) else compile
        if mode == "fsdp" and compile == "whole":
            raise ValueError(
                "runtime.compile is whole, but runtime.mode=fsdp gathers the weights of one unit at a time; set "
                "runtime.compile=true, which compiles unit by unit."
            )
        if mode == "fsdp" and not is_initialized():
            raise ValueError(
                "runtime.mode is fsdp, but 0 processes were launched to shard the state over; start with torchrun, or "
                "set runtime.mode=replicated."
            )
        can_graph = self.device.type == "cuda" and self.data_world == 1 and mode == "replicated"
        if cuda_graph is True and not can_graph:
            raise ValueError(
                "runtime.cuda_graph is true, but a step is replayed as a CUDA graph by 1 replicated process on a GPU, "
                f"and there are {self.data_world} of mode {mode} on {self.device.type}; set runtime.cuda_graph=auto."
            )
        self._graphs = can_graph if cuda_graph == "auto" else cuda_graph
        self._stepping: tuple[nn.Module, torch.optim.Optimizer] | None = None  # what `prepare` returned

    def _chosen(self, where: str) -> Literal[True, False, "whole"]:
        """Return how to compile here, if that can be done and is faster; say so where only a tool is missing."""
        if where == "auto" and self.device.type == "cpu":
            return False
        form = fastest_form(self.device.type, self.is_main)
        return True if form == "whole" and self._mode == "fsdp" else form

    def require_batch(self, batch_size: int) -> None:
        """Raise ValueError where a global batch does not divide into processes and micro-batches."""
        require_divisible(batch_size, self.data_world, "processes", self._micro_batches)

    def prepare(
        self, model: nn.Module, averages: Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move the state to the device; wrap the model in DistributedDataParallel, or shard, for several processes."""
        by_name = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
        names = {parameter: name for name, parameter in model.named_parameters()}
        order = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        for module in (model, *averages):
            self.place(module)
            if self._mode == "fsdp":
                _shard(module, self.device.type, self.data_world)
        _fuse(optimizer)
        _hand_over(optimizer, order, by_name, dict(model.named_parameters()))
        if self._compile:
            torch._dynamo.config.optimize_ddp = False  # it would split blocks at the boundaries of gradient buckets
            for module in (model, *averages):
                if isinstance(module, Network):
                    compile_network(module, self.device.type, whole=self._compile == "whole")
        self._stepping = model, optimizer
        if self._mode == "fsdp" or self.data_world == 1:
            return model, optimizer
        # Buffers are constants: they need not be sent before each forward pass.
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        return wrapped, optimizer

    def assign(self, scalar: Tensor, value: float) -> Tensor:
        """Return the scalar, changed in place: a CUDA graph has recorded its address."""
        return scalar.fill_(value)

    def checkpoint(self, method: Callable[..., Any], owner: nn.Module, *arguments: Any) -> Any:
        """Apply PyTorch's activation checkpointing to ``method(owner, *arguments)``."""
        # `partial`, since torch.compile would compile the bound methods of two modules as two programs. Nothing is
        # drawn on a device, so there is no generator to restore.
        return checkpoint(partial(method, owner), *arguments, use_reentrant=False, preserve_rng_state=False)

    def feed(self, host_batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Copy each batch to the device, asynchronously on CUDA, and yield its micro-batches."""
        for batch in host_batches:
            yield micro_batches_of(mapped(batch, self.put), self._micro_batches)

    def step(self, function: Callable[..., Metrics]) -> Step:
        """Return the step unchanged, or as one that is replayed as a CUDA graph."""
        if not self._graphs:
            return function
        assert self._stepping is not None, "prepare comes before step"
        return GraphedStep(function, *self._stepping, self.device)

    def micro_step(self, model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch's passes: gradients are exchanged in the last backward pass only."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(is_last)
        if isinstance(model, DistributedDataParallel) and not is_last:
            context: AbstractContextManager[Any] = model.no_sync()
            return context
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients, which DistributedDataParallel or FSDP averages over processes."""
        loss.backward()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale the averaged gradients down to the global norm ``max_norm``, and return the norm before."""
        trained = list(parameters)
        norm = self.norm([p.grad for p in trained if p.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
        return norm

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the Euclidean norm of all tensors together; the shards of a tensor are summed over processes."""
        norm = torch.nn.utils.get_total_norm(tensors)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def fetch(self, history: Sequence[Metrics]) -> dict[str, list[float]]:
        """Return the metrics' means over processes, copied to the host at once.

        An all-reduce would add three or more numbers in an order that depends on their place among the others.
        """
        values = torch.stack([value.float() for metrics in history for value in metrics.values()])
        of_processes = self._accelerator.gather(values).view(self.data_world, -1)
        return by_name(history, of_processes.double().mean(dim=0).float().tolist())

    def copy_to_host(self, tensors: Mapping[str, Tensor], wanted: Container[str], host: dict[str, Tensor]) -> None:
        """Copy one tensor at a time, so that a device holds at most one whole tensor; from a GPU to pinned memory."""
        pinned = self.device.type == "cuda"
        for name, value in tensors.items():
            whole = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
            if name in wanted:
                if name not in host:
                    host[name] = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=pinned)
                host[name].copy_(whole, non_blocking=pinned)
        if pinned:
            torch.cuda.current_stream().synchronize()


def _shard(module: nn.Module, device_type: str, world: int) -> None:
    """Shard by FSDP2: each unit is gathered when it is used, and all parameters outside of units are one more unit."""
    mesh = init_device_mesh(device_type, (world,))
    for unit in _units(module):
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _units(module: nn.Module) -> Sequence[nn.Module]:
    return module.units() if isinstance(module, Network) else ()


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """Set the optimizer to its fused kernel, if it has one; CPUs and GPUs support it."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"], group["foreach"] = True, False


def _hand_over(
    optimizer: torch.optim.Optimizer,
    order: Sequence[Sequence[str]],
    states: Mapping[str, Mapping[str, Tensor]],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Give the optimizer the new parameters of these names, with their states moved to the parameters' devices."""
    optimizer.state.clear()
    for group, names in zip(optimizer.param_groups, order, strict=True):
        group["params"] = [parameters[name] for name in names]
        for name in names:
            moved = {key: _beside(value, parameters[name], group) for key, value in states[name].items()}
            if moved:
                optimizer.state[parameters[name]] = moved


def _beside(value: Tensor, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    """Move optimizer state to its parameter's device and sharding. The step count stays on the CPU unless fused."""
    if value.dim() == 0:
        return value.to(parameter.device) if group.get("fused") else value
    local = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return local
    # Every process holds the whole value, so nothing needs to be sent.
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)
