"""Name the family of a DiT by the parts of its blocks that the paper's network does not have."""

from torch import nn

from model.attention import (
    QKNormSelfAttention,
    QKRmsNormSelfAttention,
    RotaryQKNormSelfAttention,
    RotaryQKRmsNormSelfAttention,
    RotarySelfAttention,
    SelfAttention,
)
from model.blocks import Block
from model.mlp import GeluMlp, SwiGluMlp

_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LayerNorm: (),
    nn.RMSNorm: ("RMSNorm",),
    GeluMlp: (),
    SwiGluMlp: ("SwiGLU",),
    SelfAttention: (),
    RotarySelfAttention: ("rotary",),
    QKNormSelfAttention: ("QK-norm",),
    QKRmsNormSelfAttention: ("QK-RMSNorm",),
    RotaryQKNormSelfAttention: ("rotary", "QK-norm"),
    RotaryQKRmsNormSelfAttention: ("rotary", "QK-RMSNorm"),
}
_LIGHTNING = ["RMSNorm", "SwiGLU", "rotary"]  # LightningDiT's own configuration; its options are added to the name


def parts_of(block: Block) -> list[str]:
    """Return the names of a block's norm, MLP and attention, without those of the paper.

    A class of another module is its own name. A block of another construction than the paper's has none: its own name
    tells it apart.
    """
    parts = [getattr(block, name, None) for name in ("norm_mlp", "mlp", "attention")]
    names = [name for part in parts if part is not None for name in _NAMES.get(type(part), (type(part).__name__,))]
    if isinstance(parts[0], nn.RMSNorm) and not parts[0].elementwise_affine:
        names[0] += " without scale"
    return names


def family_name(parts: list[str], position_table: str) -> str:
    """Return "DiT", "LightningDiT", or one of the two with the parts that are added to it."""
    added = list(parts)
    if position_table != "fixed":
        added.append({"learned": "learned positions", "none": "no position table"}[position_table])
    base = "DiT"
    if added[: len(_LIGHTNING)] == _LIGHTNING:
        base, added = "LightningDiT", added[len(_LIGHTNING) :]
    return f"{base} + {', '.join(added)}" if added else base
