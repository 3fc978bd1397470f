"""Time several pieces of work in turns, so that a machine that slows down slows all of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Seconds = list[float]  # [wall, CPU of this process], medians


def in_turns(
    works: Mapping[str, Callable[[], Any]], before: Callable[[], Any] = lambda: None, repeats: int = 7
) -> dict[str, Seconds]:
    """Return the median seconds of each piece of work; ``before`` runs before each, and the first turn is not counted.

    ``ratio`` is that of the first to each of the others.
    """
    found: dict[str, list[Seconds]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            before()
            found[name].append(_seconds_of(work))
    medians = {name: [statistics.median(kind) for kind in zip(*rows[1:], strict=True)] for name, rows in found.items()}
    ours, *others = medians.items()
    ratios = {f"{ours[0]}/{name}": [a / b for a, b in zip(ours[1], other, strict=True)] for name, other in others}
    return {name: [float(f"{value:.4g}") for value in seconds] for name, seconds in {**medians, **ratios}.items()}


def _seconds_of(work: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return [time.perf_counter() - wall, time.process_time() - cpu]


def cpu() -> dict[str, Any]:
    """Return the facts on this machine's processor, and its load over the last minute by this and other programs."""
    return {
        "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }
