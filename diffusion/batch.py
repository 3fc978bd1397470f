"""What a training step eats, and how a global batch divides."""

from collections.abc import Callable
from operator import itemgetter
from typing import TypedDict

from torch import Tensor


class Batch(TypedDict):
    """Samples with the random numbers of their visit: a process's share of a step's global batch."""

    latent: Tensor  # [B, c, h, w] float32, x_0, scaled by the autoencoder's factor
    label: Tensor  # [B] int64, already num_classes where the label was dropped
    t: Tensor  # [B] int64
    noise: Tensor  # [B, c, h, w] float32


def mapped(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """``function`` of each of a batch's tensors."""
    return Batch(
        latent=function(batch["latent"]),
        label=function(batch["label"]),
        t=function(batch["t"]),
        noise=function(batch["noise"]),
    )


def require_divisible(batch_size: int, num_members: int, members: str, micro_batches: int = 1) -> None:
    """Raise ValueError where a batch does not divide into micro-batches of ``num_members`` equal shares."""
    parts = num_members * micro_batches
    if batch_size % parts == 0:
        return
    each = f" x {micro_batches} micro-batches" if micro_batches > 1 else ""
    below = batch_size - batch_size % parts
    choices = f"{below} or {below + parts}" if below else f"{parts}"
    raise ValueError(f"batch_size {batch_size} does not divide by {num_members} {members}{each}; use {choices}.")


def micro_batches_of(batch: Batch, count: int) -> list[Batch]:
    """``count`` equal parts, in order. The rows must divide."""
    rows = len(batch["label"]) // count
    assert rows * count == len(batch["label"])
    parts = [slice(first, first + rows) for first in range(0, rows * count, rows)]
    return [mapped(batch, itemgetter(part)) for part in parts]
