"""Which GPU a run takes where several of a sweep share a machine (``hydra.launcher.n_jobs``)."""

import itertools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock

from core.locks import HeldError, acquired

_held: list[BaseFileLock] = []  # by this process, until it ends: where it has several runs, all are on the same GPU


def take_gpu(config: Mapping[str, Any], sweep: Path) -> None:
    """Make one GPU that no other process of the sweep has taken this process's default.

    Where there are more processes than GPUs, each is shared by as many. Does nothing under a launcher, which gives
    each of its processes a GPU, where there are not several, and for a job on the CPU.
    """
    count = torch.cuda.device_count()
    on_cpu = config.get("runtime", {}).get("device") == "cpu"
    if count < 2 or on_cpu or _held or "WORLD_SIZE" in os.environ:
        return
    gpu, lock = lease(count, sweep / f".gpus-{platform.node()}")
    _held.append(lock)
    torch.cuda.set_device(gpu)


def lease(count: int, folder: Path) -> tuple[int, BaseFileLock]:
    """A number below ``count`` that fewest others hold, and the lock that holds it and dies with its process."""
    for place in itertools.count():
        try:
            lock = acquired(folder / f"{place}.lock", timeout_sec=0)
        except HeldError:
            continue
        return place % count, lock
    raise AssertionError("itertools.count has no end")
