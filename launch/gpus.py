"""Which GPU a run takes where several of a sweep share a machine (``hydra.launcher.n_jobs``)."""

import itertools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

_held: list[FileLock] = []  # by this process, until it ends: where it has several runs, all are on the same GPU


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


def lease(count: int, folder: Path) -> tuple[int, FileLock]:
    """A number below ``count`` that fewest others hold, and the lock that holds it and dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in itertools.count():
        lock = FileLock(folder / f"{place}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        return place % count, lock
    raise AssertionError("itertools.count has no end")
