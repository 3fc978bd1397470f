"""Attention layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.attend import AttentionLayer


class SelfAttention(AttentionLayer):
    """Multi-head self-attention. A variant overrides how queries and keys are prepared for the scores."""

    sees_positions = False  # whether `rotate` needs the tokens' positions

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the mixed tokens: [B, T, d], [T, 2] row and column, [B, T] bool (False: masked out) -> [B, T, d]."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # gradients come back in this layout
        query, key = self.normalize(query, key)
        if positions is not None:
            query, key = self.rotate(query, positions), self.rotate(key, positions)
        mixed = self.attend(query, key, value, over_keys(mask))
        return self.projection(mixed.transpose(1, 2).reshape(batch, length, width))

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys [B, heads, T, d / heads] as the scores use them; the paper leaves them unchanged."""
        return query, key

    def rotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Return queries or keys [B, heads, T, d / heads] rotated by positions [T, 2]; the paper does not rotate."""
        return vectors


AttentionFactory = Callable[[int, int], SelfAttention]  # (width, num_heads) -> attention


class QKNormSelfAttention(SelfAttention):
    """Queries and keys normalized per head (Dehghani et al. 2023, section 2).

    The paper does not do this. It prevents attention scores from growing late in long bf16 runs.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.norm_query = nn.LayerNorm(width // num_heads, eps=1e-6)
        self.norm_key = nn.LayerNorm(width // num_heads, eps=1e-6)

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys [B, heads, T, d / heads], each vector normalized with a learned scale and shift."""
        return self.norm_query(query).to(query.dtype), self.norm_key(key).to(key.dtype)


class CrossAttention(AttentionLayer):
    """Multi-head attention from tokens to another sequence."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mixed tokens: [B, T, d], context [B, M, d], [B, M] bool (False: masked out) -> [B, T, d]."""
        batch, length, width = tokens.shape
        query = self._heads(self.query(tokens))
        key, value = (self._heads(part) for part in self.key_value(context).chunk(2, dim=2))
        mixed = self.attend(query, key, value, over_keys(mask))
        return self.projection(mixed.transpose(1, 2).reshape(batch, length, width))

    def _heads(self, vectors: Tensor) -> Tensor:
        """Split the width into heads: [B, T, d] -> [B, heads, T, d / heads]."""
        batch, length, width = vectors.shape
        return vectors.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)


def over_keys(mask: Tensor | None) -> Tensor | None:
    """Return the mask [B, M] as [B, 1, 1, M], which every head and query shares."""
    return None if mask is None else mask[:, None, None, :]


def initialize_linears(module: nn.Module, generator: torch.Generator) -> None:
    """Set every linear map inside ``module`` to Xavier-uniform weights and zero biases, in definition order.

    Joint maps (qkv, keys and values) are drawn as one matrix, as in the released code.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
