"""Place tensors and run denoisers and decoders on XLA's devices, with one process per host.

PyTorch/XLA runs in its SPMD mode: one program over all devices. `runtime.xla` trains on them.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.distributed.xla_backend  # registers the address xla:// with torch.distributed
import torch_xla.runtime as xr
from torch import Tensor, nn

from core.batch import Condition, Denoiser
from runtime.agreement import require_same
from runtime.hosts import Hosts
from runtime.protocol import ModuleT, Precision
from runtime.sharding import SHARDED, Axes

DATA = "data"  # the mesh axis along which only the batch is sharded


class XlaDevices:
    """A mesh of all devices, ``data`` x ``fsdp_devices``; the batch is sharded over both axes.

    Raises ValueError where ``fsdp_devices`` does not divide the number of devices.
    """

    def __init__(
        self, precision: Precision, fsdp_devices: int | None, compilation_cache: str | None, timeout_sec: float
    ) -> None:
        xr.use_spmd()
        if compilation_cache is not None and not torch_xla._XLAC._xla_computation_cache_is_initialized():
            xr.initialize_cache(compilation_cache)
        self.device = torch_xla.device()
        self.data_rank, self.data_world = xr.process_index(), xr.process_count()
        self.is_main = self.data_rank == 0
        self.num_devices: int = xr.global_runtime_device_count()
        self.num_local_devices: int = xr.addressable_runtime_device_count()
        self._precision = precision
        self._num_shards = self.num_devices if fsdp_devices is None else fsdp_devices
        if self._num_shards < 1 or self.num_devices % self._num_shards:
            raise ValueError(
                f"runtime.fsdp_devices {self._num_shards} does not divide the {self.num_devices} devices; use a "
                "divisor of their number."
            )
        order, shape = np.arange(self.num_devices), (self.num_devices // self._num_shards, self._num_shards)
        self._state_mesh = xs.Mesh(order, shape, (DATA, SHARDED))
        self._batch_mesh = xs.Mesh(order, (self.num_devices,), (DATA,))  # tensors of rank 1 need a mesh of one axis
        self._feeds_own_rows = self.data_world > 1  # this host sends its rows of a batch, not the whole batch
        self._hosts = Hosts(self.data_rank, self.data_world, "xla://", timeout_sec)

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Raise ValueError where hosts differ in a fact, exchanged over their network."""
        require_same(facts, self._hosts.exchange)

    def together(self) -> AbstractContextManager[Any]:
        """Return a context in which a failing host stops the others: hosts have no launcher that would do so."""
        return self._hosts.together()

    def place(self, module: ModuleT) -> ModuleT:
        """Copy the whole module to every device."""
        self._distribute(module, {})
        return module

    def _distribute(self, module: nn.Module, axes: Mapping[str, Axes]) -> None:
        """Replace parameters and buffers by copies on the devices; those without axes are unsharded."""
        for path, part in module.named_modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.device.type != self.device.type:
                    value = self._put(parameter.detach(), axes.get(f"{path}.{name}".lstrip(".")))
                    part._parameters[name] = nn.Parameter(value, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.device.type != self.device.type:
                    part._buffers[name] = self._put(buffer)

    def _put(self, value: Tensor, axes: Axes | None = None) -> Tensor:
        """Copy state to the devices, sharded along its axes. Every host holds the whole value."""
        spec = xs.ShardingSpec(self._state_mesh, axes or (None,) * value.dim())
        return _send(value, self.device, spec)

    def put(self, rows: Tensor) -> Tensor:
        """Copy to each device its part of this host's rows."""
        spec = xs.ShardingSpec(self._batch_mesh, (DATA,) + (None,) * (rows.dim() - 1), self._feeds_own_rows)
        return _send(rows, self.device, spec)

    def rows(self, batch: Tensor) -> Tensor:
        """Execute pending operations, then copy this host's rows to the host."""
        torch_xla.sync(wait=True)
        share = len(batch) // self.data_world
        return self._whole(batch)[self.data_rank * share : (self.data_rank + 1) * share]

    def parts(self, batch: Tensor, most: int) -> Sequence[Tensor]:
        """Return the batch whole: each device has only a few of its rows."""
        return [batch]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the network's precision."""
        return torch.autocast("xla", torch.bfloat16, enabled=self._precision == "bf16")

    def inference(self, denoiser: Denoiser) -> Denoiser:
        """Return the denoiser as a graph of its own, the same at every step of a sampler."""

        def run(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            torch_xla.sync()
            output = denoiser(x_t, t, condition)
            torch_xla.sync()
            return output

        return run

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of all hosts, concatenated, over their network."""
        return np.concatenate(self._hosts.exchange(rows))

    def wait(self) -> None:
        """Wait until every host has arrived; devices need not wait."""
        self._hosts.wait()

    def _whole(self, value: Tensor) -> Tensor:
        if self.data_world > 1:
            return value.cpu()  # a small program over all hosts gathers it
        shards = torch_xla._XLAC._get_local_shards([value])[0]
        places = torch_xla._XLAC._get_local_shard_replica_and_indices([value])[0]
        result = torch.empty(value.shape, dtype=value.dtype)
        for (shard, _), (replica, place) in zip(shards, places, strict=True):
            if replica == 0:
                result[tuple(place) if isinstance(place, list) else place] = shard
        return result


def _send(value: Tensor, device: torch.device, spec: xs.ShardingSpec) -> Tensor:
    """Copy a value to the devices, sharded or whole as ``spec`` says."""
    sent: Any = xm.send_cpu_data_to_device([value.contiguous()], device, input_sharding=spec)
    result: Tensor = sent[0]
    return result
