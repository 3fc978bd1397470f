"""Transformer blocks: the paper's four, classes behind one interface, chosen by ``model/block=...``.

A block is built by a factory ``(width, num_heads) -> Block``. Adding one is a class here, a YAML in
``conf/model/block`` and a test. All of them take a condition of M rows, the timestep's embedding and, where there are
labels, the label's; how they use it is what distinguishes them (paper, section 3.2 and figure 3).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.attention import CrossAttention, SelfAttention
from model.final_layers import AdaptiveFinalLayer, FinalLayer, modulate

AttentionFactory = Callable[[int, int], SelfAttention]  # (width, num_heads) -> attention


class Block(nn.Module):
    """Maps tokens to tokens under a condition."""

    final_layer: type[FinalLayer] = FinalLayer

    def enter(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Before the first block: [B, N, d] -> [B, N', d]."""
        return tokens

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, N', d] tokens and [B, M, d] condition (row 0 the timestep's) -> [B, N', d]."""
        raise NotImplementedError

    def leave(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """After the last block: [B, N', d] -> [B, N, d]."""
        return tokens

    def initialize(self) -> None:
        """Set the weights that differ from xavier-uniform linears with zero biases."""


class Mlp(nn.Module):
    """Pointwise feed-forward network with tanh-approximated GELU."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, int(width * mlp_ratio))
        self.output = nn.Linear(self.hidden.out_features, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, d] -> [B, N, d]."""
        return self.output(nn.functional.gelu(self.hidden(tokens), approximate="tanh"))


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


class InContextBlock(_TransformerBlock):
    """In-context conditioning: timestep and label are M more tokens, the block is a plain ViT's."""

    def enter(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Put the condition before the image's tokens: [B, N, d] -> [B, M + N, d]."""
        return torch.cat([condition.to(tokens.dtype), tokens], dim=1)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, M + N, d] -> [B, M + N, d]; the condition is among the tokens already."""
        tokens = tokens + self.attention(self.norm_attention(tokens))
        return tokens + self.mlp(self.norm_mlp(tokens))

    def leave(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Drop the condition's tokens: [B, M + N, d] -> [B, N, d]."""
        return tokens[:, condition.shape[1] :]


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
        """[B, N, d], [B, M, d] -> [B, N, d]."""
        tokens = tokens + self.attention(self.norm_attention(tokens))
        tokens = tokens + self.cross_attention(self.norm_cross_attention(tokens), condition)
        return tokens + self.mlp(self.norm_mlp(tokens))


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
        """[B, M, d] -> ``num_modulations`` tensors [B, d]."""
        regressed = self.modulation(nn.functional.silu(condition.sum(dim=1)))
        return regressed.chunk(self.num_modulations, dim=1)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, N, d], [B, M, d] -> [B, N, d]."""
        shift_a, scale_a, shift_m, scale_m = self.modulations(condition)
        tokens = tokens + self.attention(modulate(self.norm_attention(tokens), shift_a, scale_a))
        return tokens + self.mlp(modulate(self.norm_mlp(tokens), shift_m, scale_m))


class AdaLNZeroBlock(AdaLNBlock):
    """AdaLN with a regressed gate on each branch, zero at the start: an untrained block is the identity."""

    num_modulations = 6

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[B, N, d], [B, M, d] -> [B, N, d]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulations(condition)
        mixed = self.attention(modulate(self.norm_attention(tokens), shift_a, scale_a))
        tokens = tokens + gate_a.unsqueeze(1) * mixed
        fed = self.mlp(modulate(self.norm_mlp(tokens), shift_m, scale_m))
        return tokens + gate_m.unsqueeze(1) * fed
