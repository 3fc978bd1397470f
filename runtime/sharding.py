"""Choose the dimension along which each parameter is sharded: one rule for matrices, and a table of exceptions.

A matrix is sharded along its first dimension that the number of devices divides. In a DiT that is a multiple of the
model's width (in all of the paper's sizes a multiple of 128), but for SwiGLU's hidden width, whose rows may not divide;
then its columns do. A convolution falls back in the same way from its outputs to its inputs, and stays whole where the
devices divide neither. Vectors stay whole: they are small, and each sharded one costs a collective.
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn

SHARDED = "fsdp"  # the mesh axis that state is sharded over
Axes = tuple[str | None, ...]  # the mesh axis of each dimension; None: whole
Rule = tuple[str, Axes]  # pattern of a full parameter name, its axes

# Matrices whose number of rows is not a multiple of the model's width, though the devices may happen to divide it.
EXCEPTIONS: tuple[Rule, ...] = (
    (r"label_embedding\.weight", (None, SHARDED)),  # [classes + 1, d]
    (r"unet\.class_embedding\.weight", (None, SHARDED)),  # the same of a U-Net
    (r"final_layer\.decoder\.weight", (None, SHARDED)),  # [2 c p p, d]
    (r"position_embedding", (None, SHARDED)),  # [T, d], where it is learned
    (r"blocks\.\d+\.modulation_table", (None, SHARDED)),  # [6, d], where blocks share a modulation
)


def axes_of(name: str, shape: Sequence[int], num_shards: int, exceptions: Sequence[Rule] = EXCEPTIONS) -> Axes:
    """Return the axes of the parameter ``name``, for ``num_shards`` devices along the sharded axis.

    Raises ValueError where ``num_shards`` divides no dimension of a matrix, and where two exceptions match.
    """
    found = [(pattern, axes) for pattern, axes in exceptions if re.fullmatch(pattern, name)]
    if len(found) > 1:
        raise ValueError(
            f"The parameter {name} matches {len(found)} exceptions of runtime/sharding.py: "
            f"{', '.join(repr(pattern) for pattern, _ in found)}, but it may match 1; correct the table."
        )
    if len(shape) < 2:
        return (None,) * len(shape)
    if found:
        axes = found[0][1]
        assert len(axes) == len(shape), (name, axes, tuple(shape))
        dimension = axes.index(SHARDED)
    else:
        outputs_and_inputs = enumerate(shape[:2])
        dimension = next((number for number, size in outputs_and_inputs if size % num_shards == 0), 0)
    if len(shape) > 2 and shape[dimension] % num_shards:
        return (None,) * len(shape)
    if shape[dimension] % num_shards:
        raise ValueError(
            f"{name} has {shape[dimension]} rows to shard, which is not a multiple of {num_shards} devices; set "
            "runtime.fsdp_devices to a divisor of model.width, or runtime.mode=replicated."
        )
    return tuple(SHARDED if number == dimension else None for number in range(len(shape)))


def sharding_of(model: nn.Module, num_shards: int, exceptions: Sequence[Rule] = EXCEPTIONS) -> Mapping[str, Axes]:
    """Return the axes of every parameter by name. Raises ValueError as `axes_of` does."""
    return {name: axes_of(name, value.shape, num_shards, exceptions) for name, value in model.named_parameters()}
