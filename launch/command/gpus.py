"""Choose a GPU for each run where several runs of a sweep share a machine (``hydra.launcher.n_jobs``)."""

import itertools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock

from core.locks import HeldError, acquired

_held: list[BaseFileLock] = []  # held until this process ends; if it has several runs, all use the same GPU


def take_gpu(config: Mapping[str, Any], sweep: Path) -> None:
    """Make a GPU that no other process of the sweep uses the default of this process.

    Where there are more processes than GPUs, they share the GPUs evenly. Does nothing with fewer than two GPUs, for a
    job on the CPU, and under a launcher such as torchrun, which assigns the GPUs itself.
    """
    count = torch.cuda.device_count()
    on_cpu = config.get("runtime", {}).get("device") == "cpu"
    if count < 2 or on_cpu or _held or "WORLD_SIZE" in os.environ:
        return
    gpu, lock = lease(count, sweep / f".gpus-{platform.node()}")
    _held.append(lock)
    torch.cuda.set_device(gpu)


def lease(count: int, folder: Path) -> tuple[int, BaseFileLock]:
    """Return a number below ``count`` that the fewest others hold, and a lock that holds it until this process ends."""
    for place in itertools.count():
        try:
            lock = acquired(folder / f"{place}.lock", timeout_sec=0)
        except HeldError:
            continue
        return place % count, lock
    raise AssertionError("itertools.count has no end")
