"""Compute a linear map and GELU plainly, by one kernel for inference on a CPU, or in the form that compiles best."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# A linear map, then GELU: its layer and tokens [B, T, d] -> [B, T, hidden].
Hidden = Callable[[nn.Linear, Tensor], Tensor]

_TWICE_SLOPE = 2 * math.sqrt(2 / math.pi)  # of u = sqrt(2 / pi) (x + 0.044715 x^3), the argument of GELU's tanh


def plain_hidden(linear: nn.Linear, tokens: Tensor) -> Tensor:
    """Apply the layer, then the tanh-approximated GELU."""
    return nn.functional.gelu(linear(tokens), approximate="tanh")


def fused_hidden(linear: nn.Linear, tokens: Tensor) -> Tensor:
    """Apply both by one kernel of oneDNN under bf16 autocast on a CPU, where nothing is trained or compiled.

    This takes less than half of the time (docs/speed.md), and rounds to bf16 once instead of twice.
    """
    is_inference = not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    if not is_inference or torch.compiler.is_compiling() or linear.bias is None:
        return plain_hidden(linear, tokens)
    kernels, bias = torch.ops.mkldnn, linear.bias.bfloat16()
    weight = kernels._reorder_linear_weight(linear.weight.bfloat16(), tokens[..., 0].numel())  # else it is slow
    fused: Tensor = kernels._linear_pointwise(tokens.bfloat16(), weight, bias, "gelu", [], "tanh")
    return fused


def compiled_hidden(linear: nn.Linear, tokens: Tensor) -> Tensor:
    """Apply the layer, then GELU as x sigmoid(2 u), which equals x (1 + tanh u) / 2, where a compiler reads it.

    A compiled exponential takes about a third of the time of a compiled tanh (docs/speed.md). Uncompiled, this is
    `plain_hidden`.
    """
    if not torch.compiler.is_compiling():
        return plain_hidden(linear, tokens)
    x = linear(tokens)
    return x * torch.sigmoid(x * (_TWICE_SLOPE + _TWICE_SLOPE * 0.044715 * x * x))


def has_fused_hidden() -> bool:
    """Return whether this build of PyTorch and this processor have the kernel."""
    kernels = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(kernels, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
        and bool(kernels._is_mkldnn_bf16_supported())
    )


class GeluLayer(nn.Module):
    """A layer that computes a linear map and GELU by ``hide``, which `hide_by` sets."""

    hide: Hidden = staticmethod(plain_hidden)


def hide_by(hidden: Hidden, network: nn.Module) -> None:
    """Let all such layers of a network compute them by this function."""
    for part in network.modules():
        if isinstance(part, GeluLayer):
            part.hide = hidden
