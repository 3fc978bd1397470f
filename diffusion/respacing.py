"""The trained steps that a sampler visits."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Steps = int | str | Sequence[int]  # 250, "250", "ddim50", "10,15,20" or [10, 15, 20]


def number_of(steps: Steps) -> int:
    """Return how many steps ``steps`` asks for. Raises ValueError for a text that asks for none."""
    if isinstance(steps, str) and steps.startswith("ddim"):
        return _whole_number(steps.removeprefix("ddim"), steps)
    return sum(_sections(steps))


def kept_steps(num_trained: int, steps: Steps) -> NDArray[np.int64]:
    """Return the trained steps that ``steps`` asks for, ascending (ADM's respacing; Nichol & Dhariwal 2021, section 4).

    A number spaces so many steps evenly, both ends included; "ddimN" takes N steps at a constant whole stride
    from 0 (Song et al. 2020); several numbers split the process into equal sections and space each one's evenly.
    Raises ValueError for fewer than two steps or more than there are.
    """
    if isinstance(steps, str) and steps.startswith("ddim"):
        return _constant_stride(num_trained, _whole_number(steps.removeprefix("ddim"), steps))
    counts = _sections(steps)
    if sum(counts) < 2 or min(counts) < 1:
        raise ValueError(
            f"sampler.steps is {steps}, but a sampler needs at least 2 steps; choose between 2 and {num_trained}."
        )
    sizes = [len(section) for section in np.array_split(np.arange(num_trained), len(counts))]
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [start + _evenly_spaced(size, count) for start, size, count in zip(starts, sizes, counts, strict=True)]
    return np.concatenate(parts).astype(np.int64)


def _sections(steps: Steps) -> list[int]:
    """Return the number of steps of each section."""
    if isinstance(steps, str):
        return [_whole_number(part, steps) for part in steps.split(",")]
    return [steps] if isinstance(steps, int) else list(steps)


def _whole_number(text: str, steps: Steps) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"sampler.steps is {steps!r}, but it must be like 250, ddim50 or [10,15,20].") from error


def _evenly_spaced(size: int, count: int) -> NDArray[np.int64]:
    """Return ``count`` of range(size) at a constant fractional stride, halves rounded to even."""
    if count > size:
        raise ValueError(
            f"sampler.steps is {count}, but the process was trained with {size} steps there; choose at most {size}."
        )
    if count == 1:
        return np.zeros(1, dtype=np.int64)
    # Accumulated, not multiplied: the same rounding error as ADM's loop, hence the same steps.
    stride = (size - 1) / (count - 1)
    positions = np.concatenate([[0.0], np.cumsum(np.full(count - 1, stride))])
    return np.array([round(position) for position in positions], dtype=np.int64)


def _constant_stride(num_trained: int, count: int) -> NDArray[np.int64]:
    for stride in range(1, num_trained):
        found = np.arange(0, num_trained, stride)
        if len(found) == count:
            return found
    raise ValueError(
        f"sampler.steps is ddim{count}, but no whole stride takes {count} of {num_trained} steps; "
        f"choose a divisor of {num_trained}."
    )
