"""Pointwise feed-forward networks, made by factories ``(width, mlp_ratio) -> module``, chosen by ``model/mlp=...``."""

from collections.abc import Callable

from torch import Tensor, nn

MlpFactory = Callable[[int, float], nn.Module]  # (width, hidden width over width) -> [B, T, d] -> [B, T, d]


class GeluMlp(nn.Module):
    """Two linear maps with a tanh-approximated GELU between them (the paper's)."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, int(width * mlp_ratio))
        self.output = nn.Linear(self.hidden.out_features, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        return self.output(nn.functional.gelu(self.hidden(tokens), approximate="tanh"))
