"""Weights between this program and the released code (facebookresearch/DiT), both ways, bit for bit.

Only adaLN-Zero exists there. Its fixed position embedding is a tensor of the table too: the released trainer averages
it into its EMA, where it drifts by rounding, so the values of the table are the ones computed with.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import SelfAttention
from model.blocks import AdaLNZeroBlock
from model.dit import DiT, DiTConfig
from model.embeddings import LabelEmbedding
from model.flops import weightless
from model.mlp import GeluMlp
from model.network import Network

ANCHOR = "x_embedder.proj.weight"  # the tensor by which a table under the released names is known
ROUNDING = 1e-6  # up to which two ways of computing the fixed position embedding differ
_LABELS = "y_embedder.embedding_table.weight"
# Released name -> ours, for everything but the two tensors of other shape (see `_as_released`).
_RENAMED = (
    ("x_embedder.proj", "patch_embedding"),
    ("t_embedder.mlp.0", "timestep_embedding.input"),
    ("t_embedder.mlp.2", "timestep_embedding.output"),
    ("y_embedder.embedding_table", "label_embedding"),
    ("attn.qkv", "attention.qkv"),
    ("attn.proj", "attention.projection"),
    ("mlp.fc1", "mlp.hidden"),
    ("mlp.fc2", "mlp.output"),
    ("adaLN_modulation.1", "modulation"),
    ("final_layer.linear", "final_layer.decoder"),
)
_HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}  # S, B, L, XL


@dataclass(frozen=True)
class Description:
    """Hold what decides how weights are read, and what is done with them, in this program and in others."""

    num_heads: int
    num_classes: int
    has_null_class: bool
    frequency_shift: int
    position_drift: float  # largest difference between the position embedding and the fixed one


def describe(network: Network) -> Description:
    """Describe a network that other programs may have. Raises ValueError for one that they have not."""
    model, config = _dit(network), _dit(network).config
    return Description(
        config.num_heads, config.num_classes, model.has_null_class, config.frequency_shift, model.position_drift()
    )


def _dit(network: Network) -> DiT:
    if not isinstance(network, DiT):
        raise ValueError(
            f"Only a DiT exists outside this program, but the model is of class {type(network).__name__}; "
            "keep it in our format."
        )
    return network


def notes_on_reference(network: Network) -> list[str]:
    """Return what the released code does otherwise with these weights."""
    if describe(network).frequency_shift == 0:
        return []
    return ["the released code spaces the timestep's frequencies otherwise, so its outputs are a little off."]


def from_reference(
    state_dict: Mapping[str, Tensor],
    num_heads: int | None = None,
    num_classes: int | None = None,
    frequency_shift: int = 0,
) -> DiT:
    """Return a DiT with the released code's weights; its shape is read off them.

    ``num_heads`` cannot be read off: None takes the paper's for its four widths. ``num_classes`` says whether the last
    row of the label table is the null class (rows - 1) or a class like the others (rows); None takes it for the null
    class. Raises ValueError that names the first three tensors that are missing, unknown or of another shape.
    """
    arguments = _shape_of(state_dict, num_heads, num_classes) | {"frequency_shift": frequency_shift}
    rows = label_rows(state_dict)
    expected = to_reference(_with_rows(shapes_only(arguments), rows))
    require_tensors(state_dict, {name: tuple(value.shape) for name, value in expected.items()})
    model = _with_rows(DiT(DiTConfig(**arguments)), rows)
    ours = {_our_name(name): value for name, value in state_dict.items() if name != "pos_embed"}
    ours["patch_embedding.weight"] = ours["patch_embedding.weight"].flatten(1)
    model.load_state_dict(ours)
    model.position_embedding.copy_(state_dict["pos_embed"][0])
    return model


def shapes_only(arguments: Mapping[str, Any]) -> DiT:
    """Return a DiT without memory: what a file claims is not yet believed. Raises ValueError for no DiT's shape."""
    try:
        config = DiTConfig(**arguments)
        return weightless(lambda: DiT(config))
    except ValueError as error:
        raise ValueError(f"These are not a DiT's weights: {error}") from error


def to_reference(network: Network) -> dict[str, Tensor]:
    """Return the weights under the released names. Raises ValueError for a model that does not exist there.

    The released code has ``frequency_shift`` 0; a model with 1 would have other outputs there.
    """
    model = require_released_architecture(network)
    config = model.config
    state = {"pos_embed": model.position_embedding.unsqueeze(0)}
    state |= {_released_name(name): value for name, value in model.state_dict().items()}
    state[ANCHOR] = state[ANCHOR].view(-1, config.channels, config.patch_size, config.patch_size)
    return {name: value.detach().clone() for name, value in state.items()}


def label_rows(state_dict: Mapping[str, Tensor]) -> int:
    """Return how many rows the label table of the released weights has."""
    _require_present(state_dict, (_LABELS,))
    return int(_require_dimensions(state_dict, _LABELS, 2)[0])


def require_released_architecture(network: Network) -> DiT:
    """Return the network, which other programs have too. Raises ValueError for one that they have not."""
    model = _dit(network)
    if not isinstance(model.embedding, LabelEmbedding):
        raise ValueError("Only networks with labels exist outside this program; keep this one in our format.")
    first = model.block_list[0]
    if type(first) is not AdaLNZeroBlock or type(first.attention) is not SelfAttention:
        raise ValueError(
            f"Only adaLN-Zero blocks with plain attention exist outside this program, but the model has "
            f"{type(first).__name__} with {type(getattr(first, 'attention', None)).__name__}; keep it in our format."
        )
    for name, part, plain in (("norm", first.norm_mlp, nn.LayerNorm), ("MLP", first.mlp, GeluMlp)):
        if type(part) is not plain:
            raise ValueError(
                f"Only the {name} {plain.__name__} exists outside this program, but the model has "
                f"{type(part).__name__}; keep it in our format."
            )
    return model


def require_tensors(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where names or shapes of tensors are not the expected ones, naming the first three."""
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)} and not {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise ValueError(f"These are not a DiT's weights: {'; '.join(problems[:3])} ({len(problems)} in all).")


def require_depth(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many blocks there are tensors of, by the number in each name. Raises ValueError for gaps."""
    numbers = {int(found.group(1)) for name in state if (found := re.match(pattern, name))}
    if not numbers or numbers != set(range(len(numbers))):
        absent = min(set(range(len(numbers) + 1)) - numbers)
        raise ValueError(f"These are not a DiT's weights: there are {len(numbers)} blocks, but no block {absent}.")
    return len(numbers)


def replace_label_table(model: DiT, num_classes: int) -> DiT:
    """Return the same network for another number of classes; only the label table is drawn anew, from the seed 0."""
    renewed = DiT(replace(model.config, num_classes=num_classes))
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("label_embedding.")}
    renewed.load_state_dict(kept, strict=False)
    renewed.position_embedding.copy_(model.position_embedding)
    return renewed


@torch.no_grad()
def add_null_class(model: DiT) -> DiT:
    """Return the same network with a row for the null class, drawn anew from the seed 0, behind its classes' rows."""
    completed = replace_label_table(model, model.config.num_classes)
    _labels(completed).weight[:-1] = _labels(model).weight
    return completed


def _with_rows(model: DiT, rows: int) -> DiT:
    if rows == model.config.num_classes:
        _labels(model).remove_null_class()
    return model


def _labels(model: DiT) -> LabelEmbedding:
    found = model.embedding
    assert isinstance(found, LabelEmbedding)
    return found


def _shape_of(state: Mapping[str, Tensor], num_heads: int | None, num_classes: int | None) -> dict[str, Any]:
    """Return DiT's arguments, from the shapes of the released weights."""
    _require_present(state, (ANCHOR, "pos_embed", _LABELS, "final_layer.linear.weight"))
    width, channels, patch_size, patch_width = _require_dimensions(state, ANCHOR, 4)
    grid = math.isqrt(_require_dimensions(state, "pos_embed", 3)[1])
    rows = label_rows(state)
    if patch_size != patch_width or width % 4 or min(width, channels, patch_size, grid, rows) < 1:
        raise ValueError(f"These are not a DiT's weights: {ANCHOR} is {tuple(state[ANCHOR].shape)}.")
    return {
        "latent_size": grid * patch_size,
        "channels": channels,
        "patch_size": patch_size,
        "width": width,
        "depth": require_depth(state, r"blocks\.(\d{1,4})\."),
        "num_heads": _heads(width, num_heads),
        "num_classes": max(rows - 1, 1) if num_classes is None else num_classes,
        "outputs_per_channel": state["final_layer.linear.weight"].shape[0] // (channels * patch_size**2),
    }


def _heads(width: int, num_heads: int | None) -> int:
    if num_heads is None and width not in _HEADS_OF_WIDTH:
        raise ValueError(
            f"The number of heads of a model of width {width} is not in its weights; give foreign.num_heads."
        )
    heads = _HEADS_OF_WIDTH[width] if num_heads is None else num_heads
    if heads < 1 or width % heads:
        raise ValueError(f"foreign.num_heads is {heads}, but that does not divide the width {width} of the weights.")
    return heads


def _require_present(state: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    absent = [f"{name} is missing" for name in names if name not in state]
    if absent:
        raise ValueError(f"These are not a DiT's weights: {'; '.join(absent[:3])}.")


def _require_dimensions(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape)
    if len(shape) != dimensions:
        raise ValueError(f"These are not a DiT's weights: {name} is {shape}, but it must have {dimensions} dimensions.")
    return shape


def _our_name(name: str) -> str:
    for released, ours in _RENAMED:
        name = name.replace(released, ours)
    return name


def _released_name(name: str) -> str:
    for released, ours in _RENAMED:
        name = name.replace(ours, released)
    return name
