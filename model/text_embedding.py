"""Embed the output of a text encoder: its tokens for attention, its pooled vector for adaptive norms."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.embeddings import ConditionEmbedding, Embedded

TOKENS, MASK, POOLED = "text", "text_mask", "text_pooled"  # names in a condition
_MOST = {"length": 2**12, "dim": 2**16, "pooled_dim": 2**16}  # a config may come from a file


class _Projection(nn.Module):
    """Maps vectors to the network's width by two layers with GELU (tanh), as PixArt-alpha does with T5's tokens."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, width)
        self.output = nn.Linear(width, width)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the projected vectors: [..., dim] -> [..., d]."""
        return self.output(nn.functional.gelu(self.hidden(vectors), approximate="tanh"))


class TextEmbedding(ConditionEmbedding):
    """Embeds captions as a text encoder represents them, for each kind of block.

    In-context and cross-attention blocks get the tokens, adaptive norms the sum of timestep and pooled vector. With
    ``timestep_token``, the timestep is the first token, as it is for labels; PixArt-alpha's blocks, whose norms see the
    timestep, attend to the text alone. Raises ValueError for sizes that no text encoder has.
    """

    name = "text_embedding"

    def __init__(
        self,
        num_classes: int,
        width: int,
        length: int,
        dim: int,
        pooled_dim: int,
        timestep_token: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("length", length), ("dim", dim), ("pooled_dim", pooled_dim)):
            if not 1 <= value <= _MOST[name]:
                raise ValueError(
                    f"model.embedding.{name} is {value}, but it must be from 1 to {_MOST[name]}; give that of the text "
                    "encoder."
                )
        if num_classes:
            raise ValueError(
                f"model.num_classes is {num_classes}, but a network of text embeds no classes; leave it out."
            )
        self._length, self._dim, self._pooled_dim = length, dim, pooled_dim
        self._timestep_token = timestep_token
        self.tokens = _Projection(dim, width)
        self.pooled = _Projection(pooled_dim, width)

    def embed(self, timestep: Tensor, condition: Mapping[str, Tensor]) -> Embedded:
        """Embed {"text": [B, M, dim], "text_mask": [B, M] bool, "text_pooled": [B, pooled_dim]}, of any float dtype.

        The mask is False where the encoder padded a caption; no output depends on the tokens there.
        """
        vector = timestep + self.pooled(condition[POOLED].float())
        tokens, mask = self.tokens(condition[TOKENS].float()), condition[MASK]
        if self._timestep_token:
            tokens = torch.cat([timestep.unsqueeze(1).to(tokens.dtype), tokens], dim=1)
            mask = nn.functional.pad(mask, (1, 0), value=True)
        return Embedded(vector, tokens, mask)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the weights from normal(0, 0.02), as those of the timestep's two layers."""
        for linear in (self.tokens.hidden, self.tokens.output, self.pooled.hidden, self.pooled.output):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)

    def example(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return zeros of the shapes that `embed` takes, without padding."""
        return {
            TOKENS: torch.zeros(batch, self._length, self._dim, device=device),
            MASK: torch.ones(batch, self._length, dtype=torch.bool, device=device),
            POOLED: torch.zeros(batch, self._pooled_dim, device=device),
        }
