"""Define norms of tokens, built by factories ``(width, affine) -> module``; ``model/norm=...`` selects one."""

from collections.abc import Callable

from torch import nn

NormFactory = Callable[[int, bool], nn.Module]  # (width, has learned scale and shift) -> module: [..., d] -> [..., d]


def layer_norm(width: int, affine: bool) -> nn.LayerNorm:
    """Return the paper's norm, a layer norm."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


def rms_norm(width: int, affine: bool, always_scaled: bool = True) -> nn.RMSNorm:
    """Return a root-mean-square norm (Zhang & Sennrich 2019), which has no mean and no shift.

    ``always_scaled`` gives adaptive blocks a learned scale too, as in LightningDiT.
    """
    return nn.RMSNorm(width, eps=1e-6, elementwise_affine=affine or always_scaled)
