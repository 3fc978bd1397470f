"""What a training step eats, and what a network is conditioned on: trees of tensors whose rows are samples."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar, cast

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
    t: Tensor  # [B] int64
    condition: Condition  # already the null condition where it was dropped


def mapped(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    """Return the tree, a batch or a condition, with ``function`` of each of its tensors."""
    return cast(Tree, tree_map(function, tree))


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Return some rows of a batch."""
    return mapped(batch, lambda tensor: tensor[rows])


def micro_batches_of(batch: Batch, count: int) -> list[Batch]:
    """Return ``count`` equal parts, in order. The rows must divide."""
    rows = len(batch.noise) // count
    assert rows * count == len(batch.noise)
    return [rows_of(batch, slice(first, first + rows)) for first in range(0, rows * count, rows)]
