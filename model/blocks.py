"""Define the paper's four transformer blocks, and variants, behind one interface; ``model/block=...`` selects one.

A factory ``(width, num_heads) -> Block`` builds a block, which builds its norms, attention and MLP by factories too:
a new norm works with every block. A new block is a class here, a YAML in ``conf/model/block`` and a test. Blocks
differ in how they use the condition (paper, section 3.2 and figure 3).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from model.attention import AttentionFactory, CrossAttention, SelfAttention
from model.embeddings import Embedded
from model.final_layers import AdaptiveFinalLayer, FinalLayer, modulate, scaled
from model.mlp import GeluMlp, MlpFactory
from model.norms import NormFactory, layer_norm


class Assembly:
    """Assembles the sequence of T' tokens that blocks work on: here the T tokens of the image alone."""

    def enter(self, tokens: Tensor, embedded: Embedded) -> Tensor:
        """Return the sequence before the first block: [B, T, d] -> [B, T', d]."""
        return tokens

    def places(self, positions: Tensor, embedded: Embedded) -> Tensor:
        """Return the positions of the sequence: [T, 2] row and column of the image's tokens -> [T', 2]."""
        return positions.clone()  # a new tensor each pass: PyTorch/XLA overwrites the inputs of what it recomputes

    def leave(self, sequence: Tensor, embedded: Embedded) -> Tensor:
        """Return the image's tokens after the last block: [B, T', d] -> [B, T, d]."""
        return sequence


class ConditionFirst(Assembly):
    """Puts the condition's M tokens before the image's T."""

    def enter(self, tokens: Tensor, embedded: Embedded) -> Tensor:
        """Return the condition's and the image's tokens: [B, T, d] -> [B, M + T, d]."""
        return torch.cat([embedded.tokens.to(tokens.dtype), tokens], dim=1)

    def places(self, positions: Tensor, embedded: Embedded) -> Tensor:
        """Return the positions with the condition's tokens at the origin: [T, 2] -> [M + T, 2]."""
        return nn.functional.pad(positions, (0, 0, embedded.tokens.shape[1], 0))

    def leave(self, sequence: Tensor, embedded: Embedded) -> Tensor:
        """Return the image's tokens: [B, M + T, d] -> [B, T, d]."""
        return sequence[:, embedded.tokens.shape[1] :]


class SharedModulation(nn.Linear):
    """Regresses the condition's vector to modulations once, for all blocks of a network: [B, d] -> [B, k d]."""

    def forward(self, vector: Tensor) -> Tensor:
        """Return the modulations [B, k d] of the condition's vector [B, d]."""
        return super().forward(nn.functional.silu(vector))

    def initialize(self) -> None:
        """Zero it: untrained blocks do not see their condition."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Block(nn.Module):
    """Maps a sequence of tokens and a condition to a sequence of the same length."""

    name: ClassVar[str]  # in records and figures; each class has its own
    assembly: type[Assembly] = Assembly
    sees_positions = False  # whether `forward` needs the tokens' positions
    reads_tokens = False  # whether it uses the condition's tokens

    def forward(self, tokens: Tensor, embedded: Embedded, positions: Tensor | None = None) -> Tensor:
        """Return the new tokens: [B, T', d], the condition, [T', 2] row and column of each token -> [B, T', d]."""
        raise NotImplementedError

    def final_layer(self, width: int, patch_values: int) -> FinalLayer:
        """Return a new layer that decodes the output of blocks of this kind."""
        return FinalLayer(width, patch_values)

    def shared_modulation(self, width: int) -> SharedModulation | None:
        """Return a new module whose result all blocks of the network get as ``embedded.modulation``, or None."""
        return None

    def initialize(self) -> None:
        """Set the weights that differ from xavier-uniform linears with zero biases."""


class _TransformerBlock(Block):
    """The common part of all four blocks: a pre-norm attention branch and a pre-norm MLP branch."""

    affine_norms = True  # False in adaptive blocks, which regress the scale and shift that norms would learn
    final_layer_class: type[FinalLayer] = FinalLayer

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attention: AttentionFactory = SelfAttention,
        norm: NormFactory = layer_norm,
        mlp: MlpFactory = GeluMlp,
    ) -> None:
        super().__init__()
        self._norm = norm
        self.norm_attention = norm(width, self.affine_norms)
        self.attention = attention(width, num_heads)
        self.norm_mlp = norm(width, self.affine_norms)
        self.mlp = mlp(width, mlp_ratio)
        self.sees_positions = self.attention.sees_positions

    def final_layer(self, width: int, patch_values: int) -> FinalLayer:
        """Return a final layer with the norm of the blocks."""
        return self.final_layer_class(width, patch_values, self._norm)


class InContextBlock(_TransformerBlock):
    """The block of in-context conditioning: a plain ViT block; timestep and label are M additional tokens."""

    name = "in-context"
    reads_tokens = True
    assembly = ConditionFirst

    def forward(self, tokens: Tensor, embedded: Embedded, positions: Tensor | None = None) -> Tensor:
        """Return the new tokens: [B, M + T, d] -> [B, M + T, d]. The condition is already among them."""
        mask = embedded.mask
        if mask is not None:  # it covers the condition's tokens; none of the image's are masked out
            mask = nn.functional.pad(mask, (0, tokens.shape[1] - mask.shape[1]), value=True)
        tokens = tokens + self.attention(self.norm_attention(tokens), positions, mask)
        return tokens + self.mlp(self.norm_mlp(tokens))


class CrossAttentionBlock(_TransformerBlock):
    """The block with cross-attention: after self-attention, tokens attend to the condition's (timestep, label)."""

    name = "cross-attention"
    reads_tokens = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attention: AttentionFactory = SelfAttention,
        norm: NormFactory = layer_norm,
        mlp: MlpFactory = GeluMlp,
    ) -> None:
        super().__init__(width, num_heads, mlp_ratio, attention, norm, mlp)
        self.norm_cross_attention = norm(width, True)
        self.cross_attention = CrossAttention(width, num_heads)

    def forward(self, tokens: Tensor, embedded: Embedded, positions: Tensor | None = None) -> Tensor:
        """Return the new tokens: [B, T, d] -> [B, T, d]."""
        tokens = tokens + self.attention(self.norm_attention(tokens), positions)
        tokens = tokens + self.cross_attention(self.norm_cross_attention(tokens), embedded.tokens, embedded.mask)
        return tokens + self.mlp(self.norm_mlp(tokens))


class AdaLNBlock(_TransformerBlock):
    """The block with adaptive layer norm: the sum of the embeddings is regressed to scale and shift of both norms."""

    name = "adaLN"
    affine_norms = False
    final_layer_class = AdaptiveFinalLayer
    num_modulations = 4

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attention: AttentionFactory = SelfAttention,
        norm: NormFactory = layer_norm,
        mlp: MlpFactory = GeluMlp,
    ) -> None:
        super().__init__(width, num_heads, mlp_ratio, attention, norm, mlp)
        self._add_modulation(width)

    def _add_modulation(self, width: int) -> None:
        self.modulation = nn.Linear(width, self.num_modulations * width)

    def initialize(self) -> None:
        """Zero the modulation: an untrained block does not see its condition."""
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def modulations(self, embedded: Embedded) -> tuple[Tensor, ...]:
        """Return ``num_modulations`` tensors [B, d]."""
        regressed = self.modulation(nn.functional.silu(embedded.vector))
        return regressed.chunk(self.num_modulations, dim=1)

    def forward(self, tokens: Tensor, embedded: Embedded, positions: Tensor | None = None) -> Tensor:
        """Return the new tokens: [B, T, d] -> [B, T, d]."""
        shift_a, scale_a, shift_m, scale_m = self.modulations(embedded)
        tokens = tokens + self.attention(modulate(self.norm_attention(tokens), shift_a, scale_a), positions)
        return tokens + self.mlp(modulate(self.norm_mlp(tokens), shift_m, scale_m))


class AdaLNUnshiftedBlock(AdaLNBlock):
    """The adaLN block without a shift: the scale of both norms is regressed."""

    name = "adaLN-unshifted"
    num_modulations = 2

    def forward(self, tokens: Tensor, embedded: Embedded, positions: Tensor | None = None) -> Tensor:
        """Return the new tokens: [B, T, d] -> [B, T, d]."""
        scale_a, scale_m = self.modulations(embedded)
        tokens = tokens + self.attention(scaled(self.norm_attention(tokens), scale_a), positions)
        return tokens + self.mlp(scaled(self.norm_mlp(tokens), scale_m))


class AdaLNZeroBlock(AdaLNBlock):
    """The adaLN block with a regressed gate on each branch, zero at first: an untrained block is the identity."""

    name = "adaLN-Zero"
    num_modulations = 6

    def forward(self, tokens: Tensor, embedded: Embedded, positions: Tensor | None = None) -> Tensor:
        """Return the new tokens: [B, T, d] -> [B, T, d]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulations(embedded)
        mixed = self.attention(modulate(self.norm_attention(tokens), shift_a, scale_a), positions)
        tokens = tokens + gate_a.unsqueeze(1) * mixed
        fed = self.mlp(modulate(self.norm_mlp(tokens), shift_m, scale_m))
        return tokens + gate_m.unsqueeze(1) * fed


class AdaLNZeroUnshiftedBlock(AdaLNZeroBlock):
    """The adaLN-Zero block without a shift: scale and gate of each branch are regressed (an option of LightningDiT)."""

    name = "adaLN-Zero-unshifted"
    num_modulations = 4

    def forward(self, tokens: Tensor, embedded: Embedded, positions: Tensor | None = None) -> Tensor:
        """Return the new tokens: [B, T, d] -> [B, T, d]."""
        scale_a, gate_a, scale_m, gate_m = self.modulations(embedded)
        mixed = self.attention(scaled(self.norm_attention(tokens), scale_a), positions)
        tokens = tokens + gate_a.unsqueeze(1) * mixed
        return tokens + gate_m.unsqueeze(1) * self.mlp(scaled(self.norm_mlp(tokens), scale_m))


class AdaLNZeroSharedBlock(AdaLNZeroBlock):
    """The adaLN-Zero block whose modulations are regressed once for all blocks, plus a learned table [6, d] of its own.

    PixArt-alpha (Chen et al. 2023, arXiv 2310.00426, section 2.3) calls it adaLN-single. Here the label is part of the
    condition, the tables begin at zero, as adaLN-Zero's modulations do, and the final layer is that of adaLN-Zero.
    """

    name = "adaLN-Zero-shared"

    def _add_modulation(self, width: int) -> None:
        self.modulation_table = nn.Parameter(torch.zeros(self.num_modulations, width))

    def shared_modulation(self, width: int) -> SharedModulation:
        """Return a new module that regresses the modulations of all blocks."""
        return SharedModulation(width, self.num_modulations * width)

    def initialize(self) -> None:
        """Zero the table: with the shared modulation at zero, an untrained block is the identity."""
        nn.init.zeros_(self.modulation_table)

    def modulations(self, embedded: Embedded) -> tuple[Tensor, ...]:
        """Return ``num_modulations`` tensors [B, d]."""
        assert embedded.modulation is not None, "the network computes the modulation that its blocks share"
        shared = embedded.modulation.unflatten(1, (self.num_modulations, -1))
        return (shared + self.modulation_table.to(shared.dtype)).unbind(1)


class AdaLNZeroCrossBlock(AdaLNZeroBlock):
    """The adaLN-Zero block with cross-attention to the condition's tokens between its branches, for text.

    As in PixArt-alpha (arXiv 2310.00426, section 2.3), cross-attention has neither norm nor modulation nor gate. Its
    projection is zero at first, so that an untrained block is the identity.
    """

    name = "adaLN-Zero-cross"
    reads_tokens = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attention: AttentionFactory = SelfAttention,
        norm: NormFactory = layer_norm,
        mlp: MlpFactory = GeluMlp,
    ) -> None:
        super().__init__(width, num_heads, mlp_ratio, attention, norm, mlp)
        self.cross_attention = CrossAttention(width, num_heads)

    def initialize(self) -> None:
        """Zero the modulation and the projection of cross-attention."""
        super().initialize()
        nn.init.zeros_(self.cross_attention.projection.weight)
        nn.init.zeros_(self.cross_attention.projection.bias)

    def forward(self, tokens: Tensor, embedded: Embedded, positions: Tensor | None = None) -> Tensor:
        """Return the new tokens: [B, T, d] -> [B, T, d]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulations(embedded)
        mixed = self.attention(modulate(self.norm_attention(tokens), shift_a, scale_a), positions)
        tokens = tokens + gate_a.unsqueeze(1) * mixed
        tokens = tokens + self.cross_attention(tokens, embedded.tokens, embedded.mask)
        fed = self.mlp(modulate(self.norm_mlp(tokens), shift_m, scale_m))
        return tokens + gate_m.unsqueeze(1) * fed


class AdaLNZeroSharedCrossBlock(AdaLNZeroCrossBlock, AdaLNZeroSharedBlock):
    """The block of PixArt-alpha: shared modulations, as in `AdaLNZeroSharedBlock`, and cross-attention to text."""

    name = "adaLN-Zero-shared-cross"
