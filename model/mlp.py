"""Define pointwise feed-forward networks, built by ``(width, mlp_ratio) -> module``; ``model/mlp=...`` selects one."""

from collections.abc import Callable

from torch import Tensor, nn

MlpFactory = Callable[[int, float], nn.Module]  # (width, hidden width / width) -> module: [B, T, d] -> [B, T, d]


class GeluMlp(nn.Module):
    """The paper's MLP: two linear maps with a tanh-approximated GELU between them."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, int(width * mlp_ratio))
        self.output = nn.Linear(self.hidden.out_features, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the MLP to each token: [B, T, d] -> [B, T, d]."""
        return self.output(nn.functional.gelu(self.hidden(tokens), approximate="tanh"))
