"""Transformer blocks: the paper's four, classes behind one interface, chosen by ``model/block=...``.

A block is built by a factory ``(width, num_heads) -> Block``. Adding one is a class here, a YAML in
``conf/model/block`` and a test. All of them take the timestep's and the label's embedding as a condition of two
rows; how they use it is what distinguishes them (paper, section 3.2 and figure 3).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.attention import CrossAttention, SelfAttention
from model.final_layers import AdaptiveFinalLayer, FinalLayer, modulate

AttentionFactory = Callable[[int, int], SelfAttention]  # (width, num_heads) -> attention
NUM_CONDITION_TOKENS = 2  # timestep and label


class Block(nn.Module):
    """Maps tokens to tokens under a condition."""

    final_layer: type[FinalLayer] = FinalLayer

    def enter(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Before the first block: [B, N, d] -> [B, N', d]."""
        return tokens

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, N', d] tokens and [B, 2, d] condition (row 0 the timestep's, row 1 the label's) -> [B, N', d]."""
        raise NotImplementedError

    def leave(self, tokens: Tensor) -> Tensor:
        """After the last block: [B, N', d] -> [B, N, d]."""
        return tokens

    def initialize(self) -> None:
        """Set the weights that differ from xavier-uniform linears with zero biases."""

    def multiply_adds(self, num_tokens: int) -> int:
        """Multiply-adds of one image's forward pass; ``num_tokens`` is N, without tokens of the block's own."""
        raise NotImplementedError


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


class _TransformerBlock(Block):
    """What all four share: a pre-norm attention branch and a pre-norm MLP branch."""

    affine_norms = True  # adaptive blocks regress what the norms would learn

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attention: AttentionFactory = SelfAttention,
    ) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, eps=1e-6, elementwise_affine=self.affine_norms)
        self.attention = attention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6, elementwise_affine=self.affine_norms)
        self.mlp = Mlp(width, mlp_ratio)

    def multiply_adds(self, num_tokens: int) -> int:
        """Attention and MLP over all tokens."""
        return self.attention.multiply_adds(num_tokens) + self.mlp.multiply_adds(num_tokens)


class InContextBlock(_TransformerBlock):
    """In-context conditioning: timestep and label are two more tokens, the block is a plain ViT's."""

    def enter(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Put the condition before the image's tokens: [B, N, d] -> [B, 2 + N, d]."""
        return torch.cat([condition.to(tokens.dtype), tokens], dim=1)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, 2 + N, d] -> [B, 2 + N, d]; the condition is among the tokens already."""
        tokens = tokens + self.attention(self.norm_attention(tokens))
        return tokens + self.mlp(self.norm_mlp(tokens))

    def leave(self, tokens: Tensor) -> Tensor:
        """Drop the condition's tokens: [B, 2 + N, d] -> [B, N, d]."""
        return tokens[:, NUM_CONDITION_TOKENS:]

    def multiply_adds(self, num_tokens: int) -> int:
        """A plain block over two more tokens."""
        return super().multiply_adds(num_tokens + NUM_CONDITION_TOKENS)


class CrossAttentionBlock(_TransformerBlock):
    """Cross-attention: after self-attention, the tokens attend to the sequence (timestep, label)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attention: AttentionFactory = SelfAttention,
    ) -> None:
        super().__init__(width, num_heads, mlp_ratio, attention)
        self.norm_cross_attention = nn.LayerNorm(width, eps=1e-6)
        self.cross_attention = CrossAttention(width, num_heads)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, N, d], [B, 2, d] -> [B, N, d]."""
        tokens = tokens + self.attention(self.norm_attention(tokens))
        tokens = tokens + self.cross_attention(self.norm_cross_attention(tokens), condition)
        return tokens + self.mlp(self.norm_mlp(tokens))

    def multiply_adds(self, num_tokens: int) -> int:
        """A plain block and the cross-attention."""
        return super().multiply_adds(num_tokens) + self.cross_attention.multiply_adds(num_tokens, NUM_CONDITION_TOKENS)


class AdaLNBlock(_TransformerBlock):
    """Adaptive layer norm: scale and shift of both norms are regressed from the sum of the embeddings."""

    affine_norms = False
    final_layer = AdaptiveFinalLayer
    num_modulations = 4

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attention: AttentionFactory = SelfAttention,
    ) -> None:
        super().__init__(width, num_heads, mlp_ratio, attention)
        self.modulation = nn.Linear(width, self.num_modulations * width)

    def initialize(self) -> None:
        """Zero the modulation: an untrained block does not see its condition."""
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def modulations(self, condition: Tensor) -> tuple[Tensor, ...]:
        """[B, 2, d] -> ``num_modulations`` tensors [B, d]."""
        regressed = self.modulation(nn.functional.silu(condition.sum(dim=1)))
        return regressed.chunk(self.num_modulations, dim=1)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, N, d], [B, 2, d] -> [B, N, d]."""
        shift_a, scale_a, shift_m, scale_m = self.modulations(condition)
        tokens = tokens + self.attention(modulate(self.norm_attention(tokens), shift_a, scale_a))
        return tokens + self.mlp(modulate(self.norm_mlp(tokens), shift_m, scale_m))

    def multiply_adds(self, num_tokens: int) -> int:
        """A plain block, and the modulation once per image."""
        modulation = self.modulation.in_features * self.modulation.out_features
        return super().multiply_adds(num_tokens) + modulation


class AdaLNZeroBlock(AdaLNBlock):
    """AdaLN with a regressed gate on each branch, zero at the start: an untrained block is the identity."""

    num_modulations = 6

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, N, d], [B, 2, d] -> [B, N, d]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulations(condition)
        mixed = self.attention(modulate(self.norm_attention(tokens), shift_a, scale_a))
        tokens = tokens + gate_a.unsqueeze(1) * mixed
        fed = self.mlp(modulate(self.norm_mlp(tokens), shift_m, scale_m))
        return tokens + gate_m.unsqueeze(1) * fed
