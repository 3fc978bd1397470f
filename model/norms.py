"""Define norms of tokens, built by factories ``(width, affine) -> module``; ``model/norm=...`` selects one."""

from collections.abc import Callable

from torch import nn

NormFactory = Callable[[int, bool], nn.Module]  # (width, has learned scale and shift) -> module: [..., d] -> [..., d]


def layer_norm(width: int, affine: bool) -> nn.LayerNorm:
    """Return the paper's norm, a layer norm."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
