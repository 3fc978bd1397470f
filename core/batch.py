"""Define a condition, the input of a training step and the network that takes them; divide a global batch."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import NamedTuple, Protocol, TypeVar, cast

from torch import Tensor
from torch.utils._pytree import tree_map

# What a sample is conditioned on, by name: tensors [B, ...]; empty for an unconditional network. Samplers, guidance,
# runtimes and the loop pass it through unseen: its source in data/ makes it, its embedding in model/ reads it.
Condition = Mapping[str, Tensor]
Tree = TypeVar("Tree")


class Batch(NamedTuple):
    """Samples with the random numbers of their visit: a process's share of a step's global batch."""

    x_0: Tensor  # [B, c, h, w] float32, the latent, scaled by the autoencoder's factor
    noise: Tensor  # [B, c, h, w] float32
    t: Tensor  # [B] int64 steps or float32 times, by the objective
    condition: Condition  # already the null condition where it was dropped


class Denoiser(Protocol):
    """A network that knows no schedule, no guidance and drops no condition."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return what the objective asks for: [B, k c, h, w], where k is its ``outputs_per_channel``.

        x_t is [B, c, h, w] float, t [B] int64 or float, the condition has B rows.
        """
        ...


def mapped(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    """Return the tree (a batch or a condition) with ``function`` applied to each of its tensors."""
    return cast(Tree, tree_map(function, tree))


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
    """Return ``count`` equal parts, in order. The rows must divide."""
    rows = len(batch.noise) // count
    assert rows * count == len(batch.noise)
    parts = [slice(first, first + rows) for first in range(0, rows * count, rows)]
    return [mapped(batch, itemgetter(part)) for part in parts]
