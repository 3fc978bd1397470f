"""Compute a linear map and GELU in one of two ways: one after the other, or by one kernel, for inference on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# A linear map, then GELU: its layer and tokens [B, T, d] -> [B, T, hidden].
Hidden = Callable[[nn.Linear, Tensor], Tensor]


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
