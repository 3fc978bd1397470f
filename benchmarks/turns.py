"""Time several pieces of work in turns, so that a machine that slows down slows all of them."""

import functools
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

Seconds = list[float]  # [wall, CPU of this process], medians


def in_turns(
    works: Mapping[str, Callable[[], Any]], before: Callable[[], Any] = lambda: None, repeats: int = 7
) -> dict[str, Seconds]:
    """Return the median seconds of each piece of work; ``before`` runs before each, and the first turn is not counted.

    ``ratio`` is that of the first to each of the others.
    """
    return medians_in_turns(
        {name: functools.partial(seconds_of, work) for name, work in works.items()}, before, repeats
    )


def medians_in_turns(
    clocks: Mapping[str, Callable[[], Seconds]], before: Callable[[], Any] = lambda: None, repeats: int = 7
) -> dict[str, Seconds]:
    """Return `in_turns` of work that is timed by its clock, perhaps in another process."""
    found: dict[str, list[Seconds]] = {name: [] for name in clocks}
    for _ in range(repeats + 1):
        for name, clock in clocks.items():
            before()
            found[name].append(clock())
    medians = {name: [statistics.median(kind) for kind in zip(*rows[1:], strict=True)] for name, rows in found.items()}
    ours, *others = medians.items()
    ratios = {f"{ours[0]}/{name}": [a / b for a, b in zip(ours[1], other, strict=True)] for name, other in others}
    return {name: [float(f"{value:.4g}") for value in seconds] for name, seconds in {**medians, **ratios}.items()}


def seconds_of(work: Callable[[], Any]) -> Seconds:
    """Return the wall and CPU seconds of this process that a piece of work takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return [time.perf_counter() - wall, time.process_time() - cpu]


@contextmanager
def apart(make: Callable[..., Callable[[], Any]], *arguments: Any) -> Iterator[Callable[[], Any]]:
    """Yield a function that calls ``make(*arguments)()`` in a process of its own, where it is made once.

    What one program sets for its whole process, such as its allocator, then does not serve the other.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, make, arguments), daemon=True)
    process.start()

    def call() -> Any:
        here.send(True)
        return here.recv()

    try:
        yield call
    finally:
        here.send(False)
        process.join()


def _serve(requests: Connection, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    work = make(*arguments)
    while requests.recv():
        requests.send(work())


def cpu() -> dict[str, Any]:
    """Return the facts on this machine's processor, and its load over the last minute by this and other programs."""
    return {
        "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }
