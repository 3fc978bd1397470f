"""Choose the runtime, and check its requirements before its library is imported."""

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from runtime.protocol import Mode, Precision, Runtime

# PCI ids of Google's accelerators; its network cards have the same vendor id.
_TPU_VENDOR = "0x1ae0"
_TPU_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # v2 and v3, v4, v5, v6, v7
_LAST_TORCH_XLA = "2.9.0"  # for torch 2.9.0; there is none for a later torch
_LOWERED_PRECISION = ("XLA_USE_BF16", "XLA_DOWNCAST_BF16", "XLA_USE_FP16", "XLA_DOWNCAST_FP16")


def auto(precision: Precision, micro_batches: int = 1) -> Runtime:
    """Return the XLA runtime if this machine has a TPU, else accelerate's, which uses a GPU if there is one."""
    if has_tpu():
        return xla(precision, "tpu", micro_batches=micro_batches)
    from runtime.accelerate import AccelerateRuntime

    return AccelerateRuntime(precision, micro_batches=micro_batches)


def xla(
    precision: Precision,
    device: Literal["auto", "tpu", "cpu"] = "auto",
    cpu_devices: int | None = None,
    mode: Mode = "replicated",
    fsdp_devices: int | None = None,
    micro_batches: int = 1,
    compilation_cache: str | None = None,
    timeout_sec: float = 600.0,
) -> Runtime:
    """Return the XLA runtime on this machine's TPU, or on ``cpu_devices`` virtual devices of its CPU.

    Raises ValueError where torch_xla is missing or built for another torch, where a TPU was requested and there is
    none, and where an environment variable would lower the precision of the weights.
    """
    require_torch_xla()
    lowered = [name for name in _LOWERED_PRECISION if os.environ.get(name, "0") not in ("", "0")]
    if lowered:
        instead = "" if precision == "bf16" else " and use precision=bf16"
        raise ValueError(f"{lowered[0]} is set, which keeps weights and optimizer in 16 bits too; unset it{instead}.")
    if device == "tpu" and not has_tpu():
        raise ValueError("runtime.device is tpu, but this machine has 0 TPUs; set runtime.device=cpu or runtime=auto.")
    wanted = "TPU" if device == "tpu" or (device == "auto" and has_tpu()) else "CPU"
    os.environ["PJRT_DEVICE"] = wanted
    if wanted == "CPU" and cpu_devices is not None:
        os.environ["CPU_NUM_DEVICES"] = str(cpu_devices)
    from runtime.xla import XlaRuntime

    runtime = XlaRuntime(precision, mode, fsdp_devices, micro_batches, compilation_cache, timeout_sec)
    if wanted == "CPU" and cpu_devices is not None and runtime.num_devices != cpu_devices:
        raise ValueError(
            f"runtime.cpu_devices is {cpu_devices}, but this process already has {runtime.num_devices}; "
            "start another process for another number."
        )
    return runtime


def takes_all_devices(choice: Callable[..., Runtime] | None) -> bool:
    """Return whether the runtime of ``choice`` takes all devices of the machine: one process must run all jobs."""
    return choice is xla or (choice is auto and has_tpu())


def require_torch_xla() -> None:
    """Raise ValueError where torch_xla is missing or not of torch's version, with the command that installs both."""
    ours = torch.__version__.split("+")[0]
    command = f"pip install torch=={_LAST_TORCH_XLA} 'torch_xla[tpu]=={_LAST_TORCH_XLA}'"
    try:
        found: str | None = version("torch_xla").split("+")[0]
    except PackageNotFoundError:
        found = None
    if found == ours:
        return
    here = f"torch_xla is {found}" if found else "torch_xla is not installed"
    raise ValueError(
        f"runtime=xla needs torch and torch_xla of one version, and {_LAST_TORCH_XLA} is torch_xla's last release, "
        f"but here torch is {ours} and {here}; run: {command}"
    )


def has_tpu(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Return whether a TPU is on the PCI bus."""
    return any(
        _read(device / "vendor") == _TPU_VENDOR and _read(device / "device") in _TPU_DEVICES
        for device in devices.glob("*")
    )


def _read(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""
