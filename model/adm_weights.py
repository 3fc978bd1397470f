"""Convert weights from and to OpenAI's guided-diffusion, bit for bit.

The weights do not say the order of queries, keys and values in an attention's matrix, the number of heads, the size of
the images, or by how much an upsampler enlarges. These are arguments, by default the facts of the published files. In
the older order, which all of them have but 64x64_diffusion.pt, rows are grouped by heads, then by query, key and value;
in the newer order they are grouped by query, key and value first.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.flops import weightless
from model.network import Network
from model.released import require_tensors
from model.unet_names import BLOCK, OUTSIDE, RESIDUAL, blocks_of, dimensions_of, levels_of

if TYPE_CHECKING:
    from model.adm import ADM, ADMConfig

_NAME = "an ADM"
LABELS = "label_emb.weight"
_FIRST, _LAST = "input_blocks.0.0.weight", "out.2.weight"
_COARSEST = 8  # side of the coarsest level of all published networks
_HEAD_DIM = 64  # of the published networks, but for those with 4 heads
_GROUPS = 32  # of guided-diffusion's group norms
_UPSCALE = 4  # of both published upsamplers
_PARTS = ("to_q", "to_k", "to_v")  # of an attention's one matrix
# Our name of a layer -> theirs, outside of blocks and in a block.
_OUTSIDE = {**OUTSIDE, "class_embedding": "label_emb"}
_INSIDE = {**RESIDUAL, "group_norm": "norm", "to_out.0": "proj_out", **dict.fromkeys(_PARTS, "qkv")}


def from_adm(
    state_dict: Mapping[str, Tensor],
    new_attention_order: bool = False,
    latent_size: int | None = None,
    head_dim: int | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    upscale: int | None = None,
) -> "ADM":
    """Return an ADM with guided-diffusion's weights; its shape is inferred from them where it can be.

    None means, for ``latent_size``: 8 at the coarsest level; for ``head_dim`` and ``num_heads``: heads of 64 channels,
    or of the width where that is smaller; for ``num_classes``: one for each row of the label table, without a null
    class; for ``upscale``: 4 where the input has 6 channels, else 1. Raises ValueError naming the first three tensors
    that are missing, unknown or of another shape.
    """
    from model.adm import ADM, ADMConfig  # imported late, since diffusers takes seconds

    shape = _shape_of(state_dict, num_classes, upscale)
    shape["latent_size"] = latent_size or _COARSEST * 2 ** (len(shape["multipliers"]) - 1)
    usual = None if num_heads is not None else min(_HEAD_DIM, shape["width"])
    try:
        config = ADMConfig(**shape, head_dim=head_dim or usual, num_heads=num_heads)
        expected = weightless(lambda: ADM(config))
    except ValueError as error:
        raise ValueError(f"These are not an ADM's weights: {error}") from error
    require_tensors(state_dict, {name: tuple(value.shape) for name, value in to_adm(expected).items()}, _NAME)
    model, blocks = ADM(config), blocks_of(config)
    ours = {name: _ours(state_dict, name, blocks, config, new_attention_order) for name in model.state_dict()}
    model.load_state_dict(ours)
    return model


def to_adm(network: Network, new_attention_order: bool = False) -> dict[str, Tensor]:
    """Return the weights under guided-diffusion's names. Raises ValueError for a network that is not an ADM."""
    from model.adm import ADM

    if not isinstance(network, ADM):
        raise ValueError(
            f"guided-diffusion has only ADM's U-Net, but the model is of class {type(network).__name__}; keep it in "
            "our format."
        )
    if network.config.num_groups != _GROUPS:
        raise ValueError(
            f"guided-diffusion has group norms of {_GROUPS} groups, but the model has model.num_groups "
            f"{network.config.num_groups}; keep it in our format."
        )
    state, blocks, theirs = network.state_dict(), blocks_of(network.config), dict[str, Tensor]()
    for name, value in state.items():
        their_name = _their_name(name, blocks)
        if _part(name) == _PARTS[0]:
            parts = [state[name.replace(_PARTS[0], part)] for part in _PARTS]
            heads = network.config.heads_of(value.shape[0])
            by_heads = [rows.unflatten(0, (heads, -1)) for rows in parts]
            value = torch.stack(by_heads, dim=0 if new_attention_order else 1).flatten(0, 2)
        if _part(name) not in _PARTS[1:]:
            is_convolution = ".attentions." in name and value.dim() == 2
            theirs[their_name] = (value.unsqueeze(2) if is_convolution else value).detach().clone()
    return theirs


def _ours(
    state: Mapping[str, Tensor], name: str, blocks: Mapping[str, str], config: "ADMConfig", new_attention_order: bool
) -> Tensor:
    """Return the values of our tensor ``name``, from a state dict that has all that it should."""
    value = state[_their_name(name, blocks)]
    if ".attentions." in name and value.dim() == 3:
        value = value.squeeze(2)
    if (part := _part(name)) not in _PARTS:
        return value
    heads = config.heads_of(value.shape[0] // len(_PARTS))
    outer = (len(_PARTS), heads) if new_attention_order else (heads, len(_PARTS))
    by_part = value.unflatten(0, (*outer, -1)).unbind(0 if new_attention_order else 1)
    return by_part[_PARTS.index(part)].flatten(0, 1)


def _part(name: str) -> str:
    return name.rsplit(".", 2)[1]


def _their_name(name: str, blocks: Mapping[str, str]) -> str:
    """Return guided-diffusion's name of our tensor ``name``. Queries, keys and values have one name."""
    path, _, kind = name.removeprefix("unet.").rpartition(".")
    if path in _OUTSIDE:
        return f"{_OUTSIDE[path]}.{kind}"
    found = BLOCK.fullmatch(path)
    assert found is not None, name
    return f"{blocks[found[1]]}.{_INSIDE[found[2]]}.{kind}"


def _shape_of(state: Mapping[str, Tensor], num_classes: int | None, upscale: int | None) -> dict[str, Any]:
    """Return the arguments of `ADMConfig` that the weights determine, but for the heads."""
    inputs = dimensions_of(state, _FIRST, 4, _NAME)[1]
    if not any(name.startswith("output_blocks.") for name in state):
        raise ValueError(
            "These are not an ADM's weights: there are no output_blocks, as in guided-diffusion's classifiers of noisy "
            "images, which this program does not have."
        )
    levels = levels_of(state, "qkv.weight", "in_layers.2.weight", _NAME)
    rows = dimensions_of(state, LABELS, 2, _NAME)[0] if LABELS in state else 0
    factor = upscale or (_UPSCALE if inputs == 2 * 3 else 1)
    channels = inputs // (1 if factor == 1 else 2)
    return {
        **levels._asdict(),
        "channels": channels,
        "num_classes": rows if num_classes is None else num_classes,
        "null_class": num_classes is not None and num_classes == rows - 1,
        "outputs_per_channel": dimensions_of(state, _LAST, 4, _NAME)[0] // max(channels, 1),
        "upscale": factor,
    }
