"""TPUs, one process a host, through PyTorch/XLA's SPMD mode; virtual CPU devices run the same program.

A training step is traced into one graph and compiled once. What keeps it one: all state is created and its
sharding marked before the first step; what changes from step to step is a tensor on the device; gradients are
gone, or zero, when the step ends. `runtime.choice` imports this file after it has set the environment.
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.distributed.xla_backend  # gives torch.distributed the address xla://
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch_xla.utils.checkpoint import checkpoint

from diffusion.batch import Batch, Condition, mapped, micro_batches_of, require_divisible
from diffusion.protocol import Denoiser
from runtime.agreement import require_same
from runtime.hosts import Hosts
from runtime.protocol import Metrics, Mode, ModuleT, Precision, Step
from runtime.sharding import SHARDED, Axes, sharding_of

DATA = "data"  # the mesh axis that only the batch is spread over


class XlaRuntime:
    """A mesh of all devices, ``data`` x ``fsdp_devices``; the batch is spread over both axes.

    ``mode`` says what is spread along the second axis by the table in `runtime.sharding`: nothing; optimizer
    state and averages (``zero1``); these and the weights (``fsdp``, gathered where a layer uses them).
    Raises ValueError where the devices do not divide.
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
        xr.use_spmd()
        if compilation_cache is not None and not torch_xla._XLAC._xla_computation_cache_is_initialized():
            xr.initialize_cache(compilation_cache)
        self.device = torch_xla.device()
        self.data_rank, self.data_world = xr.process_index(), xr.process_count()
        self.is_main = self.data_rank == 0
        self.num_devices: int = xr.global_runtime_device_count()
        self.num_local_devices: int = xr.addressable_runtime_device_count()
        self._precision, self._mode, self._micro_batches = precision, mode, micro_batches
        self._num_shards = self.num_devices if fsdp_devices is None else fsdp_devices
        if self._num_shards < 1 or self.num_devices % self._num_shards:
            raise ValueError(
                f"runtime.fsdp_devices {self._num_shards} does not divide the {self.num_devices} devices; use a "
                "divisor of their number."
            )
        order, shape = np.arange(self.num_devices), (self.num_devices // self._num_shards, self._num_shards)
        self._state_mesh = xs.Mesh(order, shape, (DATA, SHARDED))
        self._batch_mesh = xs.Mesh(order, (self.num_devices,), (DATA,))  # tensors of rank 1 need a mesh of one axis
        self._feeds_own_rows = self.data_world > 1  # a host's rows of a batch, not the whole batch
        self._hosts = Hosts(self.data_rank, self.data_world, "xla://", timeout_sec)

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Over the hosts' network."""
        require_same(facts, self._hosts.exchange)

    def together(self) -> AbstractContextManager[Any]:
        """Over the hosts' network: hosts are started one by one, and nobody else looks after them."""
        return self._hosts.together()

    def require_batch(self, batch_size: int) -> None:
        """One row per device and micro-batch at least."""
        require_divisible(batch_size, self.num_devices, "devices", self._micro_batches)

    def place(self, module: ModuleT) -> ModuleT:
        """A whole copy on every device."""
        self._distribute(module, {})
        return module

    def prepare(
        self, model: nn.Module, averages: Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Spread the state by the mode. Raises ValueError for another optimizer than AdamW."""
        axes = {} if self._mode == "replicated" else sharding_of(model, self._num_shards)
        on_host = dict(model.named_parameters())
        self._distribute(model, axes if self._mode == "fsdp" else {})
        for average in averages:
            self._distribute(average, axes)
        for module in (model, *averages):
            _trace_friendly(module)
            if axes:
                self._gather_where_used(module, axes)
        spread = partial(self._optimizer_state, axes=axes)
        return model, GraphAdamW.continuing(optimizer, on_host, model, spread, self._put, self._micro_batches > 1)

    def _distribute(self, module: nn.Module, axes: Mapping[str, Axes]) -> None:
        """Replace parameters and buffers by their copies on the devices; those without axes are whole."""
        for path, part in module.named_modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.device.type != self.device.type:
                    value = self._put(parameter.detach(), axes.get(f"{path}.{name}"))
                    part._parameters[name] = nn.Parameter(value, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.device.type != self.device.type:
                    part._buffers[name] = self._put(buffer)

    def _put(self, value: Tensor, axes: Axes | None = None) -> Tensor:
        """State on the devices, spread along its axes. Every host holds the whole value."""
        spec = xs.ShardingSpec(self._state_mesh, axes or (None,) * value.dim())
        return _send(value, self.device, spec)

    def _optimizer_state(self, name: str, value: Tensor, axes: Mapping[str, Axes]) -> Tensor:
        return self._put(value, axes.get(name))

    def _gather_where_used(self, model: nn.Module, axes: Mapping[str, Axes]) -> None:
        """Each layer sees whole weights, its gradients are spread again, and its outputs stay spread by rows.

        Without this the partitioner follows the weights' sharding into the activations.
        """
        for path, part in model.named_modules():
            names = [name for name in part._parameters if any(axes.get(f"{path}.{name}", ()))]
            if names:
                specs = {name: axes[f"{path}.{name}"] for name in names}
                whole = partial(_forward_with_whole_weights, part, part.forward, specs, self._state_mesh)
                part.forward = partial(_forward_by_rows, whole, self._batch_mesh)

    def checkpoint(self, method: Callable[..., Tensor], owner: nn.Module, *arguments: Tensor) -> Tensor:
        """PyTorch/XLA's own: the compiler would undo PyTorch's. A bound method gives it the weights to take again."""
        result: Tensor = checkpoint(MethodType(method, owner), *arguments, preserve_rng_state=False)
        return result

    def feed(self, host_batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Copies go out while the step before is computed: executions do not block the host."""
        for batch in host_batches:
            yield [mapped(part, self.put) for part in micro_batches_of(batch, self._micro_batches)]

    def put(self, rows: Tensor) -> Tensor:
        """Each device gets its part of this host's rows."""
        spec = xs.ShardingSpec(self._batch_mesh, (DATA,) + (None,) * (rows.dim() - 1), self._feeds_own_rows)
        return _send(rows, self.device, spec)

    def rows(self, batch: Tensor) -> Tensor:
        """Executes what is pending, then reads."""
        torch_xla.sync(wait=True)
        share = len(batch) // self.data_world
        return self._whole(batch)[self.data_rank * share : (self.data_rank + 1) * share]

    def parts(self, batch: Tensor, most: int) -> Sequence[Tensor]:
        """The whole: each device has few of its rows."""
        return [batch]

    def step(self, function: Step) -> Step:
        """Trace, then execute without waiting."""

        def run(micro_batches: Sequence[Batch]) -> Metrics:
            metrics = function(micro_batches)
            torch_xla.sync()
            return metrics

        return run

    @contextmanager
    def _executed(self) -> Iterator[None]:
        yield
        torch_xla.sync()

    def micro_step(self, model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """A graph of its own where there are several: the same for each, so that their number costs no compilation."""
        return nullcontext() if self._micro_batches == 1 else self._executed()

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 in the network where configured."""
        return torch.autocast("xla", torch.bfloat16, enabled=self._precision == "bf16")

    def backward(self, loss: Tensor) -> None:
        """The partitioner sums over devices what the batch was spread over."""
        loss.backward()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Of the whole gradients, wherever their parts are."""
        trained = list(parameters)
        norm = self.norm([p.grad for p in trained if p.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm, foreach=False)
        return norm

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Of the whole tensors, wherever their parts are."""
        return torch.nn.utils.get_total_norm(tensors, foreach=False)

    def fetch(self, history: Sequence[Metrics]) -> dict[str, list[float]]:
        """One transfer of what the steps left on the device; nothing is compiled."""
        names = list(history[0])
        values = torch_xla._XLAC._xla_get_cpu_tensors([metrics[name] for metrics in history for name in names])
        by_step = torch.stack(values).view(len(history), len(names))
        return dict(zip(names, by_step.T.tolist(), strict=True))

    def inference(self, denoiser: Denoiser) -> Denoiser:
        """A graph of its own for the network, the same at every step of a sampler."""

        def run(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            torch_xla.sync()
            output = denoiser(x_t, t, condition)
            torch_xla.sync()
            return output

        return run

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Over the hosts' network."""
        return np.concatenate(self._hosts.exchange(rows))

    def wait(self) -> None:
        """Hosts wait for each other; devices have no need to."""
        self._hosts.wait()

    def copy_to_host(self, tensors: Mapping[str, Tensor], wanted: Container[str], host: dict[str, Tensor]) -> None:
        """One tensor at a time, so that no device has to hold more than one whole."""
        torch_xla.sync(wait=True)
        for name, value in tensors.items():
            if name in wanted or self.data_world > 1:  # several hosts gather a value together
                whole = self._whole(value.detach())
                if name in wanted:
                    host[name] = whole

    def _whole(self, value: Tensor) -> Tensor:
        if self.data_world > 1:
            return value.cpu()  # gathered by a small program over all hosts
        shards = torch_xla._XLAC._get_local_shards([value])[0]
        places = torch_xla._XLAC._get_local_shard_replica_and_indices([value])[0]
        result = torch.empty(value.shape, dtype=value.dtype)
        for (shard, _), (replica, place) in zip(shards, places, strict=True):
            if replica == 0:
                result[tuple(place) if isinstance(place, list) else place] = shard
        return result


def _send(value: Tensor, device: torch.device, spec: xs.ShardingSpec) -> Tensor:
    """A copy on the devices, spread or whole as marked."""
    sent: Any = xm.send_cpu_data_to_device([value.contiguous()], device, input_sharding=spec)
    result: Tensor = sent[0]
    return result


def _forward_with_whole_weights(
    layer: nn.Module, forward: Callable[..., Tensor], axes: Mapping[str, Axes], mesh: xs.Mesh, *inputs: Tensor
) -> Tensor:
    """``forward`` of a layer that owns the parameters of ``axes``, with gathered copies in their place."""
    kept = {name: layer._parameters[name] for name in axes}
    try:
        for name, parameter in kept.items():
            layer._parameters[name] = _Spread.apply(parameter, mesh, (None,) * len(axes[name]), axes[name])
        return forward(*inputs)
    finally:
        layer._parameters.update(kept)


def _forward_by_rows(forward: Callable[..., Tensor], mesh: xs.Mesh, *inputs: Tensor) -> Tensor:
    """``forward`` with its output, and that output's gradient, spread over their rows."""
    output = forward(*inputs)
    by_rows = (DATA,) + (None,) * (output.dim() - 1)
    spread: Tensor = _Spread.apply(output, mesh, by_rows, by_rows)
    return spread


class _Spread(torch.autograd.Function):
    """A copy that is spread by ``axes``, whose gradient is spread by ``gradient_axes``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: xs.Mesh, axes: Axes, gradient_axes: Axes) -> Tensor:
        ctx.mesh, ctx.axes = mesh, gradient_axes
        copy = value.clone()
        xs.annotate_custom_sharding(copy, mesh, axes)
        return copy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0].clone()
        xs.annotate_custom_sharding(gradient, ctx.mesh, ctx.axes)
        return gradient, None, None, None


def _trace_friendly(model: nn.Module) -> None:
    """Norms in elementary operations: the batch norm that they would become is not partitioned by every backend."""
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.forward = partial(_layer_norm, part)  # type: ignore[method-assign]


def _layer_norm(norm: nn.LayerNorm, vectors: Tensor) -> Tensor:
    """``norm(vectors)`` over the last dimension, in float32 as under autocast."""
    vectors = vectors.float()
    centred = vectors - vectors.mean(dim=-1, keepdim=True)
    normalized = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + norm.eps)
    return normalized if norm.weight is None else normalized * norm.weight + norm.bias


class GraphAdamW(torch.optim.AdamW):
    """AdamW as one unchanging graph: its state exists from the start, and the learning rate is a device tensor.

    A learning rate that is a Python number would be merged with any equal number of the step, such as one minus
    the averages' decay, and so change the graph. Made by `continuing`.
    """

    found_inf: Tensor | None = None  # [] float32, 1 where the next step is to be left out, as in PyTorch's fused AdamW
    _put: Callable[[Tensor], Tensor]
    _keeps_gradients: bool
    _num_steps: Tensor  # [] float32, one for all parameters
    _rates: dict[int, tuple[float, Tensor]]  # of each group

    @classmethod
    def continuing(
        cls,
        optimizer: torch.optim.Optimizer,
        on_host: Mapping[str, nn.Parameter],
        model: nn.Module,
        spread: Callable[[str, Tensor], Tensor],
        put: Callable[[Tensor], Tensor],
        keeps_gradients: bool,
    ) -> "GraphAdamW":
        """Of the same groups and state as ``optimizer``, which steps the parameters ``on_host``, by name.

        ``keeps_gradients`` sets gradients to zero instead of dropping them, for micro-batches.
        """
        if type(optimizer) is not torch.optim.AdamW or optimizer.defaults["amsgrad"] or optimizer.defaults["maximize"]:
            raise ValueError(
                f"runtime=xla steps with plain AdamW, but optimizer is {type(optimizer).__name__} with "
                f"{ {key: optimizer.defaults.get(key) for key in ('amsgrad', 'maximize')} }; use "
                "train/optimizer=adamw."
            )
        on_device, names = dict(model.named_parameters()), {value: name for name, value in on_host.items()}
        groups = [
            {**group, "params": [on_device[names[p]] for p in group["params"]]} for group in optimizer.param_groups
        ]
        self = cls(groups, lr=optimizer.defaults["lr"])
        self._put, self._keeps_gradients = put, keeps_gradients
        self._rates = {}
        steps = [state["step"] for state in optimizer.state.values()]
        self._num_steps = put(torch.tensor(float(steps[0]) if steps else 0.0))
        for name, before in on_host.items():
            old = optimizer.state.get(before, {})
            moments = {
                key: spread(name, old.get(key, torch.zeros_like(before.detach()))) for key in ("exp_avg", "exp_avg_sq")
            }
            self.state[on_device[name]] = {"step": self._num_steps, **moments}
            if keeps_gradients:
                on_device[name].grad = spread(name, torch.zeros_like(before.detach()))
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gone before the step's end, or zeros for the next micro-batches; else they would be its results."""
        super().zero_grad(set_to_none and not self._keeps_gradients)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Loshchilov & Hutter 2019, algorithm 2, with the bias corrections of Adam."""
        if self.found_inf is None:
            return self._update()
        moments = [state[key] for state in self.state.values() for key in ("exp_avg", "exp_avg_sq")]
        values = [self._num_steps, *(p for group in self.param_groups for p in group["params"]), *moments]
        before = [value.clone() for value in values]
        self._update()
        for value, old in zip(values, before, strict=True):
            value.mul_(1 - self.found_inf).add_(old * self.found_inf)  # exact for 0 and 1, and keeps the sharding

    def _update(self) -> None:
        self._num_steps.add_(1)
        for number, group in enumerate(self.param_groups):
            rate, decay = self._rate(number, group["lr"]), group["weight_decay"]
            beta1, beta2 = group["betas"]
            # 1 - beta^step without the cancellation that float32 has at small steps
            step_size = rate / -torch.expm1(self._num_steps * math.log(beta1))
            correction2 = torch.sqrt(-torch.expm1(self._num_steps * math.log(beta2)))
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if decay:
                    parameter.mul_(1 - rate * decay)
                mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                parameter.sub_(step_size * mean / (square.sqrt() / correction2 + group["eps"]))

    def _rate(self, number: int, value: float) -> Tensor:
        """A group's learning rate on the device, renewed where it changed."""
        if number not in self._rates or self._rates[number][0] != value:
            self._rates[number] = value, self._put(torch.tensor(value, dtype=torch.float32))
        return self._rates[number][1]
