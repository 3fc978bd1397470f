"""Compare threads that make one process's batches with as many processes: what Python's lock costs.

``python -m benchmarks.loader_threads`` prints one JSON line with samples per second of wall time by ``philox32_v1``: of
one process with one thread, of one with a thread for each core, and of all of a process for each core, which share
nothing. The three take turns; medians.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.commit import current_commit
from benchmarks.loader import ROUNDS, batches_of, posterior_of_a_vae, processor, sizes_of, write_shards
from benchmarks.turns import apart
from data.order import GlobalOrder
from data.shards import MappedShards

SECONDS, WARM_UP_SECONDS = 2.0, 1.0


def maker(folder: Path, threads: int) -> Callable[[], tuple[int, float]]:
    """Return what makes batches for some seconds, and returns how many samples, in how many seconds."""
    torch.set_num_threads(1)
    shards = MappedShards(folder, verify_checksums=False)
    autoencoder = posterior_of_a_vae(folder / "vae")
    sizes = sizes_of(batches_of(shards, GlobalOrder(0, shards.counts), autoencoder, threads=threads))

    def make(seconds: float = SECONDS) -> tuple[int, float]:
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            count += next(sizes)
        return count, time.perf_counter() - started

    make(WARM_UP_SECONDS)
    return make


def main() -> None:
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, ExitStack() as running:
        folder = Path(name)
        write_shards(folder)
        posterior_of_a_vae(folder / "vae")
        groups = {"one_thread": [1], "threads_of_one_process": [cores], "processes": [1] * cores}
        works: dict[str, list[Any]] = {
            group: [running.enter_context(apart(maker, folder, threads)) for threads in members]
            for group, members in groups.items()
        }
        pool = running.enter_context(ThreadPoolExecutor(cores))
        rates: dict[str, list[float]] = {group: [] for group in works}
        for _ in range(2 * ROUNDS):
            for group, members in works.items():
                rates[group].append(sum(count / seconds for count, seconds in pool.map(lambda make: make(), members)))
    medians = {group: round(statistics.median(found)) for group, found in rates.items()}
    alone = medians["one_thread"]
    print(
        json.dumps(
            {
                "benchmark": "loader_threads",
                "samples_per_wall_sec": medians,
                "over_one_thread": {group: round(rate / alone, 2) for group, rate in medians.items()},
                "load_average": round(os.getloadavg()[0], 1),
                "processor": processor(),
                "cores": cores,
                "torch": torch.__version__,
                "commit": current_commit(),
            }
        )
    )


if __name__ == "__main__":
    main()
