"""Transformer blocks: classes behind one interface, chosen by ``model/block=...``.

A block is built by a factory ``(width, num_heads) -> Block``. Adding one is a class here, a YAML in
``conf/model/block`` and a test.
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class Block(Protocol):
    """Maps tokens to tokens under a condition."""

    def __call__(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, N, d] tokens and [B, 2, d] condition (row 0 the timestep's, row 1 the label's) -> [B, N, d]."""
        ...

    def initialize(self) -> None:
        """Set the weights that differ from xavier-uniform linears with zero biases."""
        ...

    def multiply_adds(self, num_tokens: int) -> int:
        """Multiply-adds of one image's forward pass."""
        ...


def modulate(normalized: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Per-sample affine map of normalized tokens: [B, N, d], [B, d], [B, d] -> [B, N, d]."""
    return normalized * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SelfAttention(nn.Module):
    """Multi-head self-attention through PyTorch's scaled_dot_product_attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, d] -> [B, N, d]."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.projection(mixed.transpose(1, 2).reshape(batch, length, width))

    def multiply_adds(self, num_tokens: int) -> int:
        """Projections 4 N d^2, scores and weighted values 2 N^2 d."""
        width = self.projection.in_features
        return 4 * num_tokens * width**2 + 2 * num_tokens**2 * width


class Mlp(nn.Module):
    """Pointwise feed-forward network with tanh-approximated GELU."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, int(width * mlp_ratio))
        self.output = nn.Linear(self.hidden.out_features, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, d] -> [B, N, d]."""
        return self.output(nn.functional.gelu(self.hidden(tokens), approximate="tanh"))

    def multiply_adds(self, num_tokens: int) -> int:
        """Two linear maps over every token."""
        return 2 * num_tokens * self.output.out_features * self.output.in_features


class AdaLNZeroBlock(nn.Module):
    """Adaptive layer norm whose residual branches start at zero (paper, section 3.2, "adaLN-Zero block")."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, mlp_ratio)
        self.modulation = nn.Linear(width, 6 * width)

    def initialize(self) -> None:
        """Zero the modulation: every gate is 0, so an untrained block is the identity."""
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, N, d], [B, 2, d] -> [B, N, d]."""
        modulation = self.modulation(nn.functional.silu(condition.sum(dim=1)))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        mixed = self.attention(modulate(self.norm_attention(tokens), shift_a, scale_a))
        tokens = tokens + gate_a.unsqueeze(1) * mixed
        fed = self.mlp(modulate(self.norm_mlp(tokens), shift_m, scale_m))
        return tokens + gate_m.unsqueeze(1) * fed

    def multiply_adds(self, num_tokens: int) -> int:
        """Attention and MLP over all tokens, the modulation once per image."""
        width = self.modulation.in_features
        return self.attention.multiply_adds(num_tokens) + self.mlp.multiply_adds(num_tokens) + 6 * width**2


class AdaptiveFinalLayer(nn.Module):
    """Adaptive layer norm, then a linear decoder of each token to its patch (paper, section 3.2)."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.decoder = nn.Linear(width, patch_values)

    def initialize(self) -> None:
        """Zero the modulation and the decoder: an untrained network's output is exactly zero."""
        for linear in (self.modulation, self.decoder):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, N, d], [B, 2, d] -> [B, N, patch_values]."""
        shift, scale = self.modulation(nn.functional.silu(condition.sum(dim=1))).chunk(2, dim=1)
        return self.decoder(modulate(self.norm(tokens), shift, scale))

    def multiply_adds(self, num_tokens: int) -> int:
        """The modulation once per image, the decoder once per token."""
        width = self.decoder.in_features
        return 2 * width**2 + num_tokens * width * self.decoder.out_features


def initialize_linears(module: nn.Module, generator: torch.Generator) -> None:
    """Xavier-uniform weights and zero biases for every linear map below ``module``, in definition order."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            nn.init.zeros_(part.bias)
