"""Measure the part of the loader's work that holds Python's global lock (GIL), which threads cannot share.

``python -m benchmarks.loader_gil`` makes training batches on one thread, as `benchmarks.loader` does, and times each
call of a compiled function, which releases the GIL. It prints one JSON line: for each generator, microseconds of the
thread's processor time a sample, the whole of it and without these calls, the median and the least of many parts.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.commit import current_commit
from benchmarks.loader import BATCH_SIZE, RESUMED_STEP, batches_of, posterior_of_a_vae, processor, write_shards
from core.deferred import Deferred
from core.draws import Philox
from core.fast_draws import FAST_DRAWS
from core.latents import FAST_LATENTS
from core.philox32 import FAST_PHILOX32, Philox32
from core.samples import FAST_SAMPLES
from data.batches import TrainingBatches
from data.mapped_file import FAST_READS
from data.order import GlobalOrder
from data.shards import MappedShards

PARTS, BATCHES, WARM_UP = 25, 20, 100
WORDS, SAMPLES = "fill_first_words", "fill_samples"  # the compiled functions that Python calls for each batch


class Clock:
    """Sums the thread's processor time of some functions."""

    seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, whose time is added."""

        def run(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.thread_time() - started

        return run


@contextmanager
def timed_calls(clock: Clock) -> Iterator[None]:
    """Time the compiled functions that each batch calls."""
    compiled: tuple[Deferred[Any], ...] = (FAST_DRAWS, FAST_PHILOX32, FAST_LATENTS, FAST_READS, FAST_SAMPLES)
    before = [functions.get(functions.worth) for functions in compiled]
    assert None not in before, "a function could not be compiled"
    for functions, names in ((FAST_DRAWS, WORDS), (FAST_PHILOX32, WORDS), (FAST_SAMPLES, SAMPLES)):
        functions._loaded = functions._loaded._replace(**{names: clock.timed(getattr(functions._loaded, names))})
    yield
    for functions, loaded in zip(compiled, before, strict=True):
        functions._loaded = loaded


def microseconds(batches: TrainingBatches, clock: Clock) -> dict[str, float]:
    """Return the time of a sample, and that outside of timed calls."""
    made, found = batches.from_step(RESUMED_STEP, 10**9), list[tuple[float, float]]()
    for part in range(1 + PARTS):
        clock.seconds, started = 0.0, time.thread_time()
        count = BATCHES if part else WARM_UP
        for _ in range(count):
            next(made)
        whole = time.thread_time() - started
        found.append((whole / count / BATCH_SIZE * 1e6, (whole - clock.seconds) / count / BATCH_SIZE * 1e6))
    alls, holding = zip(*found[1:], strict=True)
    return {
        "all": round(statistics.median(alls), 2),
        "holding_the_gil": round(statistics.median(holding), 2),
        "least_all": round(min(alls), 2),
        "least_holding_the_gil": round(min(holding), 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, timed_calls(clock):
        folder = Path(name)
        write_shards(folder)
        autoencoder, shards = posterior_of_a_vae(folder / "vae"), MappedShards(folder, verify_checksums=False)
        order = GlobalOrder(0, shards.counts)
        by_generator = {
            name: microseconds(batches_of(shards, order, autoencoder, streams), clock)
            for name, streams in {"philox32_v1": Philox32, "numpy": Philox}.items()
        }
    result = {
        "benchmark": "loader_gil",
        "batch_size": BATCH_SIZE,
        "microseconds_a_sample": by_generator,
        "load_average": round(os.getloadavg()[0], 1),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": current_commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
