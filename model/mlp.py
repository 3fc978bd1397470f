"""Define pointwise feed-forward networks, built by ``(width, mlp_ratio) -> module``; ``model/mlp=...`` selects one."""

from collections.abc import Callable

from torch import Tensor, nn

from model.gelu import GeluLayer

MlpFactory = Callable[[int, float], nn.Module]  # (width, hidden width / width) -> module: [B, T, d] -> [B, T, d]


class GeluMlp(GeluLayer):
    """The paper's MLP: two linear maps with a tanh-approximated GELU between them."""

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
