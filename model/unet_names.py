"""Name the layers of U-Nets as the original programs of ADM and LDM do, and infer a U-Net's levels from such names.

Both number all steps of the way down and of the way up, each of which is a list: a residual block, attention or a
transformer where the level has it, and on the way up an upsampling layer at the end of a level. A downsampling layer is
a step.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from model.unet import UNetConfig

ANCHOR = "time_embed.0.weight"  # the tensor that identifies a state dict with these names
_MOST_BLOCKS = 1000
# Our name of a layer -> theirs, outside of blocks and in a residual block.
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(.+\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+)\.(.+)")  # and the layer in it


class Levels(NamedTuple):
    """The arguments of `UNetConfig` that the names and shapes of weights determine for every U-Net."""

    width: int
    multipliers: tuple[float, ...]
    layers: int
    attention_at: tuple[int, ...]


def levels_of(state: Mapping[str, Tensor], attention: str, upsampling: str, network: str) -> Levels:
    """Return a U-Net's levels. Raises ValueError where the weights are not a ``network``'s.

    A level has attention where its steps have the tensor ``attention`` in second place; a step that ends a level has
    ``upsampling`` in second or third place.
    """
    width = dimensions_of(state, ANCHOR, 2, network)[1]
    steps = len({found[1] for name in state if (found := re.match(r"output_blocks\.(\d{1,4})\.", name))})
    ends = [
        step
        for step in range(min(steps, _MOST_BLOCKS))
        if any(f"output_blocks.{step}.{place}.{upsampling}" in state for place in (1, 2))
    ]
    levels = len(ends) + 1
    if width < 1 or steps == 0 or steps % levels or steps > _MOST_BLOCKS:
        raise ValueError(
            f"These are not {network}'s weights: {steps} blocks of the way up are not the same number for each of "
            f"{levels} levels."
        )
    each = steps // levels  # blocks of a level on the way up, from the coarsest level
    firsts = range(0, steps, each)
    outputs = [dimensions_of(state, f"output_blocks.{step}.0.out_layers.3.weight", 4, network)[0] for step in firsts]
    attends = [f"output_blocks.{step}.1.{attention}" in state for step in firsts]
    return Levels(
        width=width,
        multipliers=tuple(count / width for count in reversed(outputs)),
        layers=each - 1,
        attention_at=tuple(2**level for level, here in enumerate(reversed(attends)) if here),
    )


def dimensions_of(state: Mapping[str, Tensor], name: str, dimensions: int, network: str) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises ValueError where it is absent or has another number of dimensions."""
    if name not in state:
        raise ValueError(f"These are not {network}'s weights: {name} is missing.")
    if state[name].dim() != dimensions:
        raise ValueError(
            f"These are not {network}'s weights: {name} is {tuple(state[name].shape)}, but it must have {dimensions} "
            "dimensions."
        )
    return tuple(state[name].shape)


def blocks_of(config: "UNetConfig") -> dict[str, str]:
    """Return the original programs' name of each block and sampling layer, by ours."""
    found, levels = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}, config.levels
    found["mid_block.resnets.1"] = "middle_block.2"
    step = 1
    for level in range(levels):
        for layer in range(config.layers):
            found[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{step}.0"
            found[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{step}.1"
            step += 1
        found[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{step}.0"
        step += 1
    step = 0
    for way, level in enumerate(reversed(range(levels))):
        for layer in range(config.layers + 1):
            found[f"up_blocks.{way}.resnets.{layer}"] = f"output_blocks.{step}.0"
            found[f"up_blocks.{way}.attentions.{layer}"] = f"output_blocks.{step}.1"
            step += 1
        last = 2 if level in config.attending_levels else 1
        found[f"up_blocks.{way}.upsamplers.0"] = f"output_blocks.{step - 1}.{last}"
    return found
