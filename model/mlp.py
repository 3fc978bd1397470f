"""Define pointwise feed-forward networks, built by ``(width, mlp_ratio) -> module``; ``model/mlp=...`` selects one."""

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


def hide_by(hidden: Hidden, network: nn.Module) -> None:
    """Let all GELU MLPs of a network compute their hidden layer by this function."""
    for part in network.modules():
        if isinstance(part, GeluMlp):
            part.hide = hidden


MlpFactory = Callable[[int, float], nn.Module]  # (width, hidden width / width) -> module: [B, T, d] -> [B, T, d]


class GeluMlp(nn.Module):
    """The paper's MLP: two linear maps with a tanh-approximated GELU between them. `hide_by` sets ``hide``."""

    hide: Hidden = staticmethod(plain_hidden)

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, int(width * mlp_ratio))
        self.output = nn.Linear(self.hidden.out_features, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the MLP to each token: [B, T, d] -> [B, T, d]."""
        return self.output(self.hide(self.hidden, tokens))


class SwiGluMlp(nn.Module):
    """The SwiGLU MLP (Shazeer 2020, equation 6) with biases, of 2/3 the hidden width: as many weights as a GELU MLP."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(2 / 3 * int(width * mlp_ratio))  # rounded as in LightningDiT
        self.gate_and_value = nn.Linear(width, 2 * hidden)
        self.output = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the MLP to each token: [B, T, d] -> [B, T, d]."""
        gate, value = self.gate_and_value(tokens).chunk(2, dim=2)
        return self.output(nn.functional.silu(gate) * value)
