"""Share a machine's cores and GPUs between the runs of a sweep (``hydra.launcher.n_jobs``). Import no PyTorch."""

import itertools
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from core.locks import HeldError, acquired

CGROUPS = Path("/sys/fs/cgroup")
_MOST_BATCH_THREADS = 8
_held: list[BaseFileLock] = []  # held until this process ends; if it has several runs, all use the same GPU


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Return the number of cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroups)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota(cgroups: Path) -> float | None:
    """Return the number of cores that the container may use, by cgroups v1 or v2, or None where it may use all."""
    try:
        if (both := cgroups / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota, period = ((cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file, or "max"
        return None


def batch_threads(cores: int) -> int:
    """Return how many threads make this process's batches: its share of ``cores`` less one for the loop, at most 8.

    In a sweep of several runs the share is OMP_NUM_THREADS, which `limit_threads` sets. A launcher of several
    processes sets that to 1, whatever the number of cores, and LOCAL_WORLD_SIZE.
    """
    processes, limit = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"))
    if processes.isdecimal() and int(processes) > 0:
        share = cores // int(processes)
    else:
        share = min(cores, int(limit)) if limit.isdecimal() else cores
    return max(1, min(_MOST_BATCH_THREADS, share - 1))


def limit_threads(threads: int) -> None:
    """Limit libraries to ``threads`` threads in this process, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch
    from threadpoolctl import threadpool_limits

    os.environ["OMP_NUM_THREADS"] = str(threads)  # for libraries that are loaded later
    threadpool_limits(threads)
    torch.set_num_threads(threads)


def take_gpu(config: Mapping[str, Any], sweep: Path) -> None:
    """Make a GPU that no other process of the sweep uses the default of this process.

    Where there are more processes than GPUs, they share the GPUs evenly. Does nothing with fewer than two GPUs, for a
    job on the CPU, and under a launcher such as torchrun, which assigns the GPUs itself.
    """
    import torch

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
