"""The devices of XLA, one process a host: where tensors lie, and what denoisers and decoders compute there.

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
import torch_xla.distributed.xla_backend  # gives torch.distributed the address xla://
import torch_xla.runtime as xr
from torch import Tensor, nn

from core.batch import Condition, Denoiser
from runtime.agreement import require_same
from runtime.hosts import Hosts
from runtime.protocol import ModuleT, Precision
from runtime.sharding import SHARDED, Axes

DATA = "data"  # the mesh axis that only the batch is spread over


class XlaDevices:
    """A mesh of all devices, ``data`` x ``fsdp_devices``; the batch is spread over both axes.

    Raises ValueError where the devices do not divide.
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
        self._feeds_own_rows = self.data_world > 1  # a host's rows of a batch, not the whole batch
        self._hosts = Hosts(self.data_rank, self.data_world, "xla://", timeout_sec)

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Over the hosts' network."""
        require_same(facts, self._hosts.exchange)

    def together(self) -> AbstractContextManager[Any]:
        """Over the hosts' network: hosts are started one by one, and nobody else looks after them."""
        return self._hosts.together()

    def place(self, module: ModuleT) -> ModuleT:
        """A whole copy on every device."""
        self._distribute(module, {})
        return module

    def _distribute(self, module: nn.Module, axes: Mapping[str, Axes]) -> None:
        """Replace parameters and buffers by their copies on the devices; those without axes are whole."""
        for path, part in module.named_modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.device.type != self.device.type:
                    value = self._put(parameter.detach(), axes.get(f"{path}.{name}".lstrip(".")))
                    part._parameters[name] = nn.Parameter(value, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.device.type != self.device.type:
                    part._buffers[name] = self._put(buffer)

    def _put(self, value: Tensor, axes: Axes | None = None) -> Tensor:
        """State on the devices, spread along its axes. Every host holds the whole value."""
        spec = xs.ShardingSpec(self._state_mesh, axes or (None,) * value.dim())
        return _send(value, self.device, spec)

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

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 in the network where configured."""
        return torch.autocast("xla", torch.bfloat16, enabled=self._precision == "bf16")

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
