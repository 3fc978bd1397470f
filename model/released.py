"""Convert weights from and to the released code (facebookresearch/DiT), bit for bit.

The released code has adaLN-Zero only. Its state dict contains the fixed position embedding too: the released trainer
averages it into the EMA, where it drifts by rounding, so networks compute with the values of the state dict.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from model.attention import SelfAttention
from model.blocks import AdaLNZeroBlock
from model.dit import DiT, DiTConfig
from model.embeddings import LabelEmbedding
from model.flops import weightless
from model.mlp import GeluMlp
from model.network import Network

ANCHOR = "x_embedder.proj.weight"  # the tensor that identifies a state dict with the released names
_LABELS = "y_embedder.embedding_table.weight"
# Released name -> ours, for all tensors except the two that have another shape (see `to_reference`).
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


def _dit(network: Network) -> DiT:
    if not isinstance(network, DiT):
        raise ValueError(
            f"Other programs have only DiT, but the model is of class {type(network).__name__}; keep it in our format."
        )
    return network


def from_reference(
    state_dict: Mapping[str, Tensor],
    num_heads: int | None = None,
    num_classes: int | None = None,
    frequency_shift: int = 0,
) -> DiT:
    """Return a DiT with the released code's weights; its shape is inferred from them.

    ``num_heads`` cannot be inferred: None selects the paper's for its four widths. ``num_classes`` says whether the
    last row of the label table is the null class (rows - 1) or a class like the others (rows); None means the null
    class. Raises ValueError naming the first three tensors that are missing, unknown or of another shape.
    """
    arguments = shape_of(state_dict, num_heads, num_classes) | {"frequency_shift": frequency_shift}
    rows = label_rows(state_dict)
    expected = to_reference(with_rows(shapes_only(arguments), rows))
    require_tensors(state_dict, {name: tuple(value.shape) for name, value in expected.items()})
    model = with_rows(DiT(DiTConfig(**arguments)), rows)
    ours = {our_name(name): value for name, value in state_dict.items() if name != "pos_embed"}
    ours["patch_embedding.weight"] = ours["patch_embedding.weight"].flatten(1)
    model.load_state_dict(ours)
    set_positions(model, state_dict["pos_embed"][0])
    return model


def shapes_only(arguments: Mapping[str, Any]) -> DiT:
    """Return a DiT on the meta device, to check a file's claims without memory. Raises ValueError for invalid ones."""
    try:
        config = DiTConfig(**arguments)
        return weightless(lambda: DiT(config))
    except ValueError as error:
        raise ValueError(f"These are not a DiT's weights: {error}") from error


def to_reference(network: Network) -> dict[str, Tensor]:
    """Return the weights under the released names. Raises ValueError for a model that the released code cannot express.

    The released code has ``frequency_shift`` 0; it would compute other outputs for a model with 1.
    """
    model = require_released_architecture(network)
    config = model.config
    state = {"pos_embed": positions_of(model).unsqueeze(0)}
    state |= {released_name(name): value for name, value in model.state_dict().items()}
    state[ANCHOR] = state[ANCHOR].view(-1, config.channels, config.patch_size, config.patch_size)
    return {name: value.detach().clone() for name, value in state.items()}


def label_rows(state_dict: Mapping[str, Tensor]) -> int:
    """Return the number of rows of the label table in the released weights."""
    _require_present(state_dict, (_LABELS,))
    return int(_require_dimensions(state_dict, _LABELS, 2)[0])


def require_released_architecture(network: Network) -> DiT:
    """Return the network as a DiT. Raises ValueError where other programs do not have its architecture."""
    model = _dit(network)
    if not isinstance(model.embedding, LabelEmbedding):
        raise ValueError("Other programs have only networks with labels; keep this one in our format.")
    first = model.block_list[0]
    if type(first) is not AdaLNZeroBlock or type(first.attention) is not SelfAttention:
        raise ValueError(
            f"Other programs have only adaLN-Zero blocks with plain attention, but the model has "
            f"{type(first).__name__} with {type(getattr(first, 'attention', None)).__name__}; keep it in our format."
        )
    for name, part, plain in (("norm", first.norm_mlp, nn.LayerNorm), ("MLP", first.mlp, GeluMlp)):
        if type(part) is not plain:
            raise ValueError(
                f"Other programs have only the {name} {plain.__name__}, but the model has "
                f"{type(part).__name__}; keep it in our format."
            )
    positions_of(model)
    return model


def require_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], network: str = "a DiT"
) -> None:
    """Raise ValueError where names or shapes of tensors differ from the expected ones, naming the first three."""
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise ValueError(f"These are not {network}'s weights: {'; '.join(problems[:3])} ({len(problems)} in all).")


def require_depth(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return the number of blocks, from the numbers in the names of tensors. Raises ValueError for gaps."""
    numbers = {int(found.group(1)) for name in state if (found := re.match(pattern, name))}
    if not numbers or numbers != set(range(len(numbers))):
        absent = min(set(range(len(numbers) + 1)) - numbers)
        raise ValueError(f"These are not a DiT's weights: there are {len(numbers)} blocks, but no block {absent}.")
    return len(numbers)


def positions_of(model: DiT) -> Tensor:
    """Return the fixed position embedding [T, d]. Raises ValueError where the network has another one, or none."""
    table = model.position_embedding
    if table is None or model.config.position_table != "fixed":
        raise ValueError(
            "Other programs have only the fixed position table, but the model has model.position_table "
            f"{model.config.position_table}; keep it in our format."
        )
    return table


def set_positions(model: DiT, table: Tensor) -> None:
    """Replace the fixed position embedding by a program's own [T, d]."""
    positions_of(model).copy_(table)


def with_rows(model: DiT, rows: int) -> DiT:
    """Return the network with a label table of so many rows: without a null class where these are the classes."""
    if rows == model.config.num_classes:
        _labels(model).remove_null_class()
    return model


def _labels(model: DiT) -> LabelEmbedding:
    found = model.embedding
    assert isinstance(found, LabelEmbedding)
    return found


def shape_of(state: Mapping[str, Tensor], num_heads: int | None, num_classes: int | None) -> dict[str, Any]:
    """Return the arguments of `DiTConfig`, from the shapes of the released weights."""
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
            f"The weights of a model of width {width} do not contain its number of heads; give foreign.num_heads."
        )
    heads = _HEADS_OF_WIDTH[width] if num_heads is None else num_heads
    if heads < 1 or width % heads:
        raise ValueError(f"foreign.num_heads is {heads}, which does not divide the width {width} of the weights.")
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


def our_name(name: str) -> str:
    """Return our name of a tensor that the released code calls ``name``."""
    for released, ours in _RENAMED:
        name = name.replace(released, ours)
    return name


def released_name(name: str) -> str:
    """Return the released code's name of a tensor that is ``name`` here."""
    for released, ours in _RENAMED:
        name = name.replace(ours, released)
    return name
