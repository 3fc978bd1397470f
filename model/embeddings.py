"""What turns timesteps, labels and grid positions into vectors of the network's width."""

import math

import torch
from torch import Tensor, nn


def sincos_frequencies(num_frequencies: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """Geometric frequencies 10,000^(-i / (num_frequencies - shift)): [num_frequencies], computed in ``dtype``."""
    exponent = -math.log(10_000) * torch.arange(num_frequencies, dtype=dtype)
    return torch.exp(exponent / (num_frequencies - shift))


def position_embedding_2d(width: int, grid_size: int) -> Tensor:
    """Fixed sine-cosine position embedding of a square grid, [grid_size**2, width] float32.

    The released DiT follows MAE: rows of the grid are the slow axis of the tokens; the first half of the
    channels encodes the column, the second half the row, each as (sines, cosines).

    Raises ValueError where width is no multiple of 4, since two axes need a sine and a cosine each.
    """
    if width % 4:
        raise ValueError(
            f"The position embedding needs a width that is a multiple of 4, but the width is {width}; "
            f"use {width - width % 4 + 4}."
        )
    frequencies = sincos_frequencies(width // 4, torch.float64)
    positions = torch.arange(grid_size, dtype=torch.float64)
    angles = torch.outer(positions, frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid_size, width / 2]
    column = axis.unsqueeze(0).expand(grid_size, -1, -1)
    row = axis.unsqueeze(1).expand(-1, grid_size, -1)
    return torch.cat([column, row], dim=2).reshape(grid_size**2, width).float()


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of t, then a two-layer perceptron with SiLU (paper, section 3.2).

    The features are (cosines, sines), the order of ADM and of the released weights. Frequency i of n is
    10,000^(-i / (n - ``frequency_shift``)): the released code has shift 0, diffusers' DiT has 1.
    """

    num_features = 256
    frequencies: Tensor

    def __init__(self, width: int, frequency_shift: int = 0) -> None:
        super().__init__()
        num_frequencies = self.num_features // 2
        # In float32 like the released code: at t = 999 the rounding of a frequency is 1e-4 of an angle.
        frequencies = sincos_frequencies(num_frequencies, torch.float32, frequency_shift)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.input = nn.Linear(self.num_features, width)
        self.output = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """[B] int64 or float (in steps of the 1,000-step process) -> [B, width]."""
        angles = t.float().unsqueeze(1) * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.output(nn.functional.silu(self.input(features)))
