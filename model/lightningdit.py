"""Convert weights from and to LightningDiT (hustvl/LightningDiT), bit for bit.

LightningDiT's network is the released DiT with optional parts, which the names and shapes of its weights show: RMSNorm
with a learned scale in adaptive blocks too, SwiGLU, rotary positions in addition to the fixed table, normalized queries
and keys, and blocks without a shift. It sees t in [0, 1], where 0 is noise and 1 is data, as SiT's does.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from model.attention import (
    AttentionFactory,
    QKNormSelfAttention,
    QKRmsNormSelfAttention,
    RotaryQKNormSelfAttention,
    RotaryQKRmsNormSelfAttention,
    RotarySelfAttention,
    SelfAttention,
)
from model.blocks import AdaLNZeroBlock, AdaLNZeroUnshiftedBlock, Block
from model.dit import BlockFactory, DiT, DiTConfig
from model.embeddings import LabelEmbedding, grid_positions, rotary_angles
from model.mlp import GeluMlp, SwiGluMlp
from model.network import Network
from model.norms import layer_norm, rms_norm
from model.released import (
    ANCHOR,
    label_rows,
    our_name,
    positions_of,
    released_name,
    require_tensors,
    set_positions,
    shape_of,
    shapes_only,
    with_rows,
)

_TABLES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")  # computed from the positions, not learned
_TABLES_WITHIN = 1e-5  # most that two ways of computing them differ
# LightningDiT's name -> ours, for the parts that the released code does not have.
_RENAMED = (
    ("attn.q_norm", "attention.norm_query"),
    ("attn.k_norm", "attention.norm_key"),
    ("norm1", "norm_attention"),
    ("norm2", "norm_mlp"),
    ("final_layer.norm_final", "final_layer.norm"),
)
_SWIGLU_RENAMED = (("mlp.w12", "mlp.gate_and_value"), ("mlp.w3", "mlp.output"))


@dataclass(frozen=True)
class _Parts:
    """LightningDiT's options that its weights have."""

    rms_norm: bool
    swiglu: bool
    rotary: bool
    qk_norm: bool
    unshifted: bool

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "_Parts":
        """Return the options that the names and shapes of LightningDiT's weights show."""
        modulation = state.get("blocks.0.adaLN_modulation.1.bias")
        return cls(
            rms_norm="blocks.0.norm1.weight" in state,
            swiglu="blocks.0.mlp.w12.weight" in state,
            rotary=_TABLES[0] in state,
            qk_norm="blocks.0.attn.q_norm.weight" in state,
            unshifted=modulation is not None and modulation.numel() == 4 * state[ANCHOR].shape[0],
        )

    @classmethod
    def of_block(cls, block: Block) -> "_Parts":
        """Return the options that a block has, as far as LightningDiT has them."""
        attention = getattr(block, "attention", None)
        return cls(
            rms_norm=isinstance(getattr(block, "norm_mlp", None), nn.RMSNorm),
            swiglu=isinstance(getattr(block, "mlp", None), SwiGluMlp),
            rotary=isinstance(attention, RotarySelfAttention | RotaryQKNormSelfAttention),
            qk_norm=isinstance(attention, QKNormSelfAttention),
            unshifted=isinstance(block, AdaLNZeroUnshiftedBlock),
        )

    @property
    def block(self) -> BlockFactory:
        """Return the factory of blocks with these options."""
        norm = rms_norm if self.rms_norm else layer_norm
        attention: tuple[AttentionFactory, AttentionFactory] = SelfAttention, RotarySelfAttention
        if self.qk_norm and self.rms_norm:
            attention = QKRmsNormSelfAttention, RotaryQKRmsNormSelfAttention
        elif self.qk_norm:
            attention = partial(QKNormSelfAttention, eps=1e-5), partial(RotaryQKNormSelfAttention, eps=1e-5)
        return partial(
            AdaLNZeroUnshiftedBlock if self.unshifted else AdaLNZeroBlock,
            mlp_ratio=4.0,
            attention=attention[self.rotary],
            norm=norm,
            mlp=SwiGluMlp if self.swiglu else GeluMlp,
        )


def has_its_parts(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights, which have the released names, have a part that the released DiT does not have."""
    return any(asdict(_Parts.of_state(state)).values())


def from_lightningdit(
    state_dict: Mapping[str, Tensor], num_heads: int | None = None, num_classes: int | None = None
) -> DiT:
    """Return a DiT with LightningDiT's weights; its shape and its parts are inferred from them.

    ``num_heads`` and ``num_classes`` as in `from_reference`. Raises ValueError naming the first three tensors that
    do not fit, and for rotary tables other than those of whole rows and columns.
    """
    arguments = shape_of(state_dict, num_heads, num_classes) | {"block": _Parts.of_state(state_dict).block}
    rows = label_rows(state_dict)
    expected = to_lightningdit(with_rows(shapes_only(arguments), rows))
    require_tensors(state_dict, {name: tuple(value.shape) for name, value in expected.items()})
    model = with_rows(DiT(DiTConfig(**arguments)), rows)
    _require_whole_positions(state_dict, model)
    others = {name: value for name, value in state_dict.items() if name not in ("pos_embed", *_TABLES)}
    ours = {_our_name(name): value for name, value in others.items()}
    ours["patch_embedding.weight"] = ours["patch_embedding.weight"].flatten(1)
    model.load_state_dict(ours)
    set_positions(model, state_dict["pos_embed"][0])
    return model


def to_lightningdit(network: Network) -> dict[str, Tensor]:
    """Return the weights under LightningDiT's names. Raises ValueError for a network that it does not have."""
    model = _require_expressible(network)
    parts, config = _Parts.of_block(model.block_list[0]), model.config
    state = {"pos_embed": positions_of(model).unsqueeze(0)} | _rotary_tables(model)
    state |= {_their_name(name, parts): value for name, value in model.state_dict().items()}
    state[ANCHOR] = state[ANCHOR].view(-1, config.channels, config.patch_size, config.patch_size)
    return {name: value.detach().clone() for name, value in state.items()}


def _require_whole_positions(state: Mapping[str, Tensor], model: DiT) -> None:
    for name, ours in _rotary_tables(model).items():
        if not (difference := float((state[name] - ours).abs().max())) <= _TABLES_WITHIN:
            raise ValueError(
                f"{name} differs by {difference:.2g} from the table of whole rows and columns, more than the "
                f"{_TABLES_WITHIN} of rounding; these positions were scaled, which this program does not do."
            )


def _require_expressible(network: Network) -> DiT:
    if not isinstance(network, DiT) or not isinstance(network.embedding, LabelEmbedding):
        raise ValueError(
            f"LightningDiT is a DiT with labels, but the model is of class {type(network).__name__} with "
            f"{type(getattr(network, 'embedding', None)).__name__}; keep it in our format."
        )
    config, first = network.config, network.block_list[0]
    if config.frequency_shift:
        raise ValueError(
            f"The model has model.frequency_shift {config.frequency_shift}, but LightningDiT has 0 only and would "
            "compute other outputs; keep it in our format."
        )
    parts = _Parts.of_block(first)
    with torch.device("meta"):
        theirs = parts.block(config.width, config.num_heads)
    if _structure(first) != _structure(theirs):
        options = ", ".join(name for name, there in asdict(parts).items() if there) or "none of its options"
        raise ValueError(
            f"The model's block {first.name} is not the one that LightningDiT has with {options}; keep it in our "
            "format."
        )
    return network


def _structure(block: nn.Module) -> tuple[list[tuple[type[nn.Module], float | None]], dict[str, torch.Size]]:
    classes = [(type(part), getattr(part, "eps", None)) for part in block.modules()]
    return classes, {name: value.shape for name, value in block.state_dict().items()}


def _rotary_tables(model: DiT) -> dict[str, Tensor]:
    """Return LightningDiT's tables [T, d / heads], in which both channels of a pair have the same angle, if any."""
    config = model.config
    if not _Parts.of_block(model.block_list[0]).rotary:
        return {}
    positions = grid_positions(config.latent_size // config.patch_size)
    angles = rotary_angles(positions, config.width // config.num_heads).repeat_interleave(2, dim=1)
    return {_TABLES[0]: angles.cos(), _TABLES[1]: angles.sin()}


def _our_name(name: str) -> str:
    for theirs, ours in (*_RENAMED, *_SWIGLU_RENAMED):
        name = name.replace(theirs, ours)
    return our_name(name)


def _their_name(name: str, parts: _Parts) -> str:
    for theirs, ours in (*_SWIGLU_RENAMED, *_RENAMED) if parts.swiglu else _RENAMED:
        name = name.replace(f"{ours}.", f"{theirs}.")
    return released_name(name)
