"""Attention layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.attend import AttentionLayer
from model.embeddings import rotary_angles


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
        heads = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.split(tokens))
        query, key = self.normalize(query, key)
        if positions is not None:
            query, key = self.rotate(query, positions), self.rotate(key, positions)
        mixed = self.attend(query, key, value, over_keys(mask))
        return self.projection(mixed.transpose(1, 2).reshape(batch, length, width))

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values [B, T, d] of tokens [B, T, d]."""
        qkv: Tensor = self.qkv(tokens)
        return qkv.unflatten(-1, (3, -1)).unbind(-2)  # gradients come back in this layout

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

    def __init__(self, width: int, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__(width, num_heads)
        self.norm_query = self.head_norm(width // num_heads, eps)
        self.norm_key = self.head_norm(width // num_heads, eps)

    def head_norm(self, head_width: int, eps: float) -> nn.Module:
        """Return a new norm of a head's queries or keys."""
        return nn.LayerNorm(head_width, eps=eps)

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys [B, heads, T, d / heads], each vector normalized with a learned scale (and shift)."""
        return self.norm_query(query.float()).to(query.dtype), self.norm_key(key.float()).to(key.dtype)


class QKRmsNormSelfAttention(QKNormSelfAttention):
    """Queries and keys normalized per head by their root mean square."""

    def head_norm(self, head_width: int, eps: float) -> nn.Module:
        """Return a new norm of a head's queries or keys."""
        return nn.RMSNorm(head_width, eps=eps)


class RotarySelfAttention(SelfAttention):
    """Queries and keys rotated by the tokens' rows and columns (Su et al. 2021, equation 34), as in LightningDiT.

    Half of a head's channels turn with the row, half with the column. So scores depend on differences of positions.
    Raises ValueError for a head dimension that is not a multiple of 4: each axis rotates pairs of channels.
    """

    sees_positions = True

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        require_rotary_heads(width, num_heads)

    def rotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Return queries or keys [B, heads, T, d / heads] with pairs of channels rotated by positions [T, 2]."""
        return rotated(vectors, positions)


class RotaryQKNormSelfAttention(QKNormSelfAttention):
    """Queries and keys normalized per head, then rotated as `RotarySelfAttention` does, with the same refusal."""

    sees_positions = True

    def __init__(self, width: int, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__(width, num_heads, eps)
        require_rotary_heads(width, num_heads)

    def rotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Return queries or keys [B, heads, T, d / heads] with pairs of channels rotated by positions [T, 2]."""
        return rotated(vectors, positions)


class RotaryQKRmsNormSelfAttention(RotaryQKNormSelfAttention):
    """Queries and keys normalized per head by their root mean square, then rotated."""

    def head_norm(self, head_width: int, eps: float) -> nn.Module:
        """Return a new norm of a head's queries or keys."""
        return nn.RMSNorm(head_width, eps=eps)


def require_rotary_heads(width: int, num_heads: int) -> None:
    """Raise ValueError for a head dimension whose channels are not pairs for each of two axes."""
    if (width // num_heads) % 4:
        raise ValueError(
            f"Rotary positions need a head dimension that is a multiple of 4, but model.width {width} with "
            f"model.num_heads {num_heads} gives {width // num_heads}; change one, or use model/attention=plain."
        )


def rotated(vectors: Tensor, positions: Tensor) -> Tensor:
    """Rotate neighboring channels by the angles of positions: [B, heads, T, d / heads], [T, 2] -> the first's shape."""
    angles = rotary_angles(positions, vectors.shape[-1])
    cosines, sines = angles.cos(), angles.sin()
    even, odd = vectors[..., ::2], vectors[..., 1::2]
    turned = torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1)
    return turned.flatten(-2).to(vectors.dtype)


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
