"""Define the condition, the batch and the denoiser that takes them, and divide a global batch into parts."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import NamedTuple, Protocol, TypeVar, cast

from torch import Tensor
from torch.utils._pytree import tree_map

# The condition of B samples: tensors [B, ...] by name; empty for an unconditional network. A source in data/ makes it
# and an embedding in model/ reads it; samplers, guidance, runtimes and the loop only pass it on.
Condition = Mapping[str, Tensor]
Tree = TypeVar("Tree")
FEATURES, WEIGHT = "features", "weight"  # names of targets


class Batch(NamedTuple):
    """Samples with their random numbers: a process's share of a step's global batch."""

    x_0: Tensor  # [B, c, h, w] float32, the latent, scaled by the autoencoder's factor
    noise: Tensor  # [B, c, h, w] float32
    t: Tensor  # [B] int64 steps or float32 times, by the objective
    condition: Condition  # already the null condition where it was dropped
    # What losses beside the objective's need, [B, ...] by name: a teacher's `FEATURES` [B, T, D] float16, and the
    # `WEIGHT` [B] float32 of their loss. Empty where there is no such loss.
    targets: Mapping[str, Tensor] = {}


class Denoiser(Protocol):
    """A network without schedule or guidance, which never drops the condition."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the prediction that the objective asks for: [B, k c, h, w], where k is its ``outputs_per_channel``.

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
    raise ValueError(f"batch_size {batch_size} is not a multiple of {num_members} {members}{each}; use {choices}.")


def micro_batches_of(batch: Batch, count: int) -> list[Batch]:
    """Return ``count`` equal parts, in order. The number of rows must be a multiple of ``count``."""
    rows = len(batch.noise) // count
    assert rows * count == len(batch.noise)
    parts = [slice(first, first + rows) for first in range(0, rows * count, rows)]
    return [mapped(batch, itemgetter(part)) for part in parts]
