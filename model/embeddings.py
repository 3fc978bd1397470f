"""Embed timesteps, conditions and grid positions as vectors of the network's width."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


def sincos_frequencies(num_frequencies: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """Return the frequencies 10,000^(-i / (num_frequencies - shift)): [num_frequencies], computed in ``dtype``."""
    exponent = -math.log(10_000) * torch.arange(num_frequencies, dtype=dtype)
    return torch.exp(exponent / (num_frequencies - shift))


def position_embedding_2d(width: int, grid_size: int) -> Tensor:
    """Return the fixed sine-cosine position embedding of a square grid, [grid_size**2, width] float32.

    The released DiT follows MAE: rows of the grid are the slow axis of the tokens; the first half of the
    channels encodes the column, the second half the row, each as (sines, cosines).

    Raises ValueError where width is not a multiple of 4: each of the two axes needs a sine and a cosine.
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


def grid_positions(grid_size: int) -> Tensor:
    """Return row and column of each token of a square grid, [grid_size**2, 2] float32."""
    axis = torch.arange(grid_size, dtype=torch.float32)
    return torch.cartesian_prod(axis, axis)


def rotary_angles(positions: Tensor, head_width: int) -> Tensor:
    """Return the angle of each pair of a head's channels: [T, 2] row and column -> [T, head_width / 2] float32.

    The first half of the angles is the row's, the second the column's. The frequencies 10,000^(-i / n) are computed on
    the device of the positions, rounded as LightningDiT's.
    """
    exponents = torch.arange(head_width // 4, dtype=torch.float32, device=positions.device) / (head_width // 4)
    frequencies = 1.0 / 10_000**exponents
    return (positions.unsqueeze(2) * frequencies).flatten(1)


class TimestepEmbedding(nn.Module):
    """Embeds t by sinusoidal features and a two-layer perceptron with SiLU (paper, section 3.2).

    The features are (cosines, sines), in the order of ADM and of the released weights. The i-th of n frequencies is
    10,000^(-i / (n - ``frequency_shift``)): the released code has shift 0, diffusers' DiT has 1.
    """

    num_features = 256
    frequencies: Tensor

    def __init__(self, width: int, frequency_shift: int = 0) -> None:
        super().__init__()
        num_frequencies = self.num_features // 2
        # In float32 like the released code: at t = 999 the rounding of a frequency changes an angle by 1e-4.
        frequencies = sincos_frequencies(num_frequencies, torch.float32, frequency_shift)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.input = nn.Linear(self.num_features, width)
        self.output = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """Return the embedded t: [B] int64 or float, in steps of the 1,000-step process -> [B, d]."""
        angles = t.float().unsqueeze(1) * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.output(nn.functional.silu(self.input(features)))


class Embedded(NamedTuple):
    """The embedded timestep and condition, which blocks are conditioned on."""

    vector: Tensor  # [B, d], for adaptive norms
    tokens: Tensor  # [B, M, d], the same as a sequence, for in-context and cross-attention blocks; M is not fixed
    mask: Tensor | None  # [B, M] bool, False where there is no token; None: there is one everywhere
    modulation: Tensor | None = None  # [B, k d], computed once for all blocks where they share it


class ConditionEmbedding(nn.Module):
    """Embeds a condition together with the timestep. This base class is for unconditional networks (condition {})."""

    name = "condition_embedding"  # the module's name in a network, which prefixes its tensors in a checkpoint
    for_tokens = False  # whether it has weights that only blocks which read the condition's tokens use

    def embed(self, timestep: Tensor, condition: Mapping[str, Tensor]) -> Embedded:
        """Embed a condition, tensors [B, ...] by name; ``timestep`` is the embedded timestep [B, d]."""
        return Embedded(timestep, timestep.unsqueeze(1), None)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the weights that differ from xavier-uniform linears with zero biases."""

    def example(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return zeros of the shapes that `embed` takes."""
        return {}


class LabelEmbedding(ConditionEmbedding, nn.Embedding):
    """A table with one row per class and, usually, a last row for the null class."""

    name = "label_embedding"

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes + 1, width)
        self.num_classes = num_classes

    def embed(self, timestep: Tensor, condition: Mapping[str, Tensor]) -> Embedded:
        """Embed {"label": [B] int64 in [0, num_classes]}: tokens are (timestep, label), the vector is their sum."""
        tokens = torch.stack([timestep, self(condition["label"])], dim=1)
        return Embedded(tokens.sum(dim=1), tokens, None)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the table from normal(0, 0.02), as the released code does."""
        nn.init.normal_(self.weight, std=0.02, generator=generator)

    def example(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return labels of the first class."""
        return {"label": torch.zeros(batch, dtype=torch.int64, device=device)}

    @property
    def has_null_class(self) -> bool:
        """Return whether there is a row for "no label"; every newly built table has one."""
        return self.num_embeddings > self.num_classes

    def remove_null_class(self) -> None:
        """Remove the null class's row: other programs' weights, trained without label dropout, have none."""
        self.weight = nn.Parameter(self.weight[: self.num_classes].detach().clone())
        self.num_embeddings = self.num_classes
