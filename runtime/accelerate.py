"""CPU, one GPU, or data-parallel GPUs and nodes, through Hugging Face accelerate."""

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
from runtime.protocol import Metrics, Precision, Step


class AccelerateRuntime(AccelerateDevices):
    """Training on `AccelerateDevices`, whose settings it takes too.

    ``mode`` replicated keeps the whole state on each (DistributedDataParallel); fsdp spreads weights,
    averages and optimizer over all of them (FSDP2). ``compile`` compiles one unit, which all equal units share.

    Raises ValueError as `AccelerateDevices` does, and where state cannot be spread because no processes were launched.
    """

    def __init__(
        self,
        precision: Precision,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        num_threads: int | None = None,
        mode: Literal["replicated", "fsdp"] = "replicated",
        micro_batches: int = 1,
        compile: bool = False,
        tf32: bool = True,
        deterministic: bool = False,
        timeout_sec: float = 600.0,
    ) -> None:
        super().__init__(precision, device, num_threads, tf32, deterministic, timeout_sec)
        self._mode, self._micro_batches, self._compile = mode, micro_batches, compile
        if mode == "fsdp" and not is_initialized():
            raise ValueError(
                "runtime.mode is fsdp, but 0 processes were launched to spread the state over; start with torchrun, or "
                "set runtime.mode=replicated."
            )

    def require_batch(self, batch_size: int) -> None:
        """One row per process and micro-batch at least."""
        require_divisible(batch_size, self.data_world, "processes", self._micro_batches)

    def prepare(
        self, model: nn.Module, averages: Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap in DistributedDataParallel, or shard, where there are several processes."""
        by_name = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
        names = {parameter: name for name, parameter in model.named_parameters()}
        order = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        for module in (model, *averages):
            module.to(self.device)
            if self._mode == "fsdp":
                _shard(module, self.device.type, self.data_world)
        _fuse(optimizer)
        _hand_over(optimizer, order, by_name, dict(model.named_parameters()))
        if self._compile:
            _compile_regions(model)
        if self._mode == "fsdp" or self.data_world == 1:
            return model, optimizer
        # Buffers are constants: there is no need to send them before each forward pass.
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        return wrapped, optimizer

    def checkpoint(self, method: Callable[..., Any], owner: nn.Module, *arguments: Any) -> Any:
        """PyTorch's own. Bound methods of two modules would be two programs to torch.compile."""
        # Nothing is drawn on a device, so there are no generators to set back.
        return checkpoint(partial(method, owner), *arguments, use_reentrant=False, preserve_rng_state=False)

    def feed(self, host_batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Copy each batch to the device, without waiting on CUDA."""
        for batch in host_batches:
            yield micro_batches_of(mapped(batch, self.put), self._micro_batches)

    def step(self, function: Step) -> Step:
        """Itself: eager execution."""
        return function

    def micro_step(self, model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged in the last backward pass only."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(is_last)
        if isinstance(model, DistributedDataParallel) and not is_last:
            context: AbstractContextManager[Any] = model.no_sync()
            return context
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients, averaged over processes by DistributedDataParallel or FSDP."""
        loss.backward()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Global norm of the averaged gradients, which are scaled down to ``max_norm``."""
        trained = list(parameters)
        norm = self.norm([p.grad for p in trained if p.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
        return norm

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Parts of sharded tensors are summed over processes."""
        norm = torch.nn.utils.get_total_norm(tensors)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def fetch(self, history: Sequence[Metrics]) -> dict[str, list[float]]:
        """Means over processes, then one copy to the host."""
        steps = [torch.stack([value.float() for value in metrics.values()]) for metrics in history]
        means = self._accelerator.reduce(torch.stack(steps, dim=1), reduction="mean").tolist()
        return dict(zip(history[0], means, strict=True))

    def copy_to_host(self, tensors: Mapping[str, Tensor], wanted: Container[str], host: dict[str, Tensor]) -> None:
        """One tensor at a time, so that no process has to hold more than one whole; to pinned memory from a GPU."""
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
    """FSDP2: each unit is gathered when it is used, and what lies around the units is gathered as one."""
    mesh = init_device_mesh(device_type, (world,))
    for unit in _units(module):
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _units(module: nn.Module) -> Sequence[nn.Module]:
    return module.units() if isinstance(module, Network) else ()


def _compile_regions(model: nn.Module) -> None:
    """Compile unit by unit: all of one class and shape share one compilation."""
    torch._dynamo.config.optimize_ddp = False  # it would cut blocks up at the bounds of buckets, to send them sooner
    for unit in _units(model):
        unit.compile()


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """One kernel for all of a parameter's arithmetic, where the optimizer has one; CPUs and GPUs have it."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"], group["foreach"] = True, False


def _hand_over(
    optimizer: torch.optim.Optimizer,
    order: Sequence[Sequence[str]],
    states: Mapping[str, Mapping[str, Tensor]],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Let the optimizer go on with the parameters and states of these names, each state where its parameter is."""
    optimizer.state.clear()
    for group, names in zip(optimizer.param_groups, order, strict=True):
        group["params"] = [parameters[name] for name in names]
        for name in names:
            moved = {key: _beside(value, parameters[name], group) for key, value in states[name].items()}
            if moved:
                optimizer.state[parameters[name]] = moved


def _beside(value: Tensor, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    """On the parameter's device and spread like it; a count of steps stays on the host but for a fused kernel."""
    if value.dim() == 0:
        return value.to(parameter.device) if group.get("fused") else value
    local = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return local
    # Every process holds the whole value, so none needs to be sent.
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)
