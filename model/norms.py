"""Norms of tokens, made by factories ``(width, affine) -> module``, chosen by ``model/norm=...``."""

from collections.abc import Callable

from torch import nn

NormFactory = Callable[[int, bool], nn.Module]  # (width, with a learned scale and shift) -> [..., d] -> [..., d]


def layer_norm(width: int, affine: bool) -> nn.LayerNorm:
    """Return the paper's norm."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
