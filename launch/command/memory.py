"""Advise which of a job's settings reduce the use of GPU memory; they change results only by rounding."""

from collections.abc import Mapping
from typing import Any

_BATCH_SIZES = {"train": "evaluation.batch_size", "evaluate": "evaluation.batch_size"}  # of generated images
_LARGER = "take a GPU with more memory"


def less_memory(job: str, settings: Any) -> str:
    """Return the advice, without settings that are already in effect."""
    name = _BATCH_SIZES.get(job, "batch_size")
    smaller = f"a smaller {name}" if _at(settings, name, 2) > 1 else ""
    if job != "train":
        return f"set {smaller}" if smaller else _LARGER
    ways = _of_a_step(settings)
    if not ways:
        return f"{_LARGER}, or for samples set {smaller}" if smaller else _LARGER
    return f"set {' or '.join(ways)}" + (f", or for samples {smaller}" if smaller else "")


def _of_a_step(settings: Any) -> list[str]:
    """Return the settings that reduce the memory of a training step: more micro-batches, and recomputed blocks."""
    batch_size, parts = _at(settings, "batch_size", 256), _at(settings, "runtime.micro_batches", 1)
    more = next((n for n in range(parts + 1, batch_size + 1) if batch_size % n == 0), None)
    ways = [] if more is None else [f"runtime.micro_batches={more}"]
    return ways if _at(settings, "activation_checkpointing", False) else [*ways, "activation_checkpointing=true"]


def _at(settings: Any, place: str, default: Any) -> Any:
    """Return the setting at a place of nested sections, or the default where the job does not have it."""
    for key in place.split("."):
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return default if settings is None else settings
