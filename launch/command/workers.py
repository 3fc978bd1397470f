"""Rank, threads and device of a process of torchrun or ``accelerate launch``, in a job without communication."""

import os

import torch

from data.encode import Workers
from runtime.launched import require_sound_environment


def workers_from_environment(threads: int | None) -> Workers:
    """Return this process's rank, the world size, and its threads: by default its share of the host's cores."""
    require_sound_environment()
    share = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return Workers(
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
        threads=threads or share,
    )


def worker_device(choice: str) -> torch.device:
    """Return the device of this process: its own local GPU, or the CPU. Raises ValueError where it has no GPU.

    That GPU becomes the process's default, so that CUDA's own allocations do not land on the first GPU.
    """
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if choice == "cpu" or (choice == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if local_rank >= num_gpus:
        fewer = "start at most that many, or " if num_gpus else ""
        raise ValueError(
            f"Process {local_rank} of this host has no GPU: PyTorch sees {num_gpus}; {fewer}set device=cpu."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
