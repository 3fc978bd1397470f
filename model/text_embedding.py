"""Embed the output of a text encoder: its tokens for attention, its pooled vector for adaptive norms.

Each embedding has the weights that its blocks use and no others: DistributedDataParallel waits for every gradient.
"""

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

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the weights from normal(0, 0.02)."""
        for linear in (self.hidden, self.output):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)


class PooledTextEmbedding(ConditionEmbedding):
    """Embeds captions by one vector each, for blocks that read no tokens: adaLN and adaLN-Zero.

    ``pooled_dim`` is the text encoder's. Raises ValueError for sizes that none has, and for classes.
    """

    name = "text_embedding"

    def __init__(self, num_classes: int, width: int, pooled_dim: int) -> None:
        super().__init__()
        _require(num_classes, pooled_dim=pooled_dim)
        self._pooled_dim = pooled_dim
        self.pooled = _Projection(pooled_dim, width)

    def embed(self, timestep: Tensor, condition: Mapping[str, Tensor]) -> Embedded:
        """Embed {"text_pooled": [B, pooled_dim] of any float dtype}: the vector is its projection and the timestep."""
        vector = timestep + self.pooled(condition[POOLED].float())
        return Embedded(vector, vector.unsqueeze(1), None)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the weights as those of the timestep's two layers."""
        self.pooled.initialize(generator)

    def example(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return zeros of the shape that `embed` takes."""
        return {POOLED: torch.zeros(batch, self._pooled_dim, device=device)}


class TextEmbedding(ConditionEmbedding):
    """Embeds captions by the tokens of a text encoder, for in-context blocks and those with cross-attention.

    The vector of adaptive norms is the timestep's and, with a ``pooled_dim``, that of the pooled caption. With
    ``timestep_token``, it is also the first token, as blocks need whose norms do not see it; PixArt-alpha's attend to
    the text alone. Raises ValueError for sizes that no text encoder has, and for classes.
    """

    name = "text_embedding"
    for_tokens = True

    def __init__(
        self,
        num_classes: int,
        width: int,
        length: int,
        dim: int,
        pooled_dim: int = 0,
        timestep_token: bool = True,
    ) -> None:
        super().__init__()
        _require(num_classes, length=length, dim=dim)
        if pooled_dim != 0:
            _require(num_classes, pooled_dim=pooled_dim)
        self._length, self._dim, self._pooled_dim = length, dim, pooled_dim
        self._timestep_token = timestep_token
        self.tokens = _Projection(dim, width)
        self.pooled = None if pooled_dim == 0 else _Projection(pooled_dim, width)

    def embed(self, timestep: Tensor, condition: Mapping[str, Tensor]) -> Embedded:
        """Embed {"text": [B, M, dim], "text_mask": [B, M] bool, "text_pooled": [B, pooled_dim]}, of any float dtype.

        The mask is False where the encoder padded a caption; no output depends on the tokens there.
        """
        vector = timestep if self.pooled is None else timestep + self.pooled(condition[POOLED].float())
        tokens, mask = self.tokens(condition[TOKENS].float()), condition[MASK]
        if self._timestep_token:
            tokens = torch.cat([vector.unsqueeze(1).to(tokens.dtype), tokens], dim=1)
            mask = nn.functional.pad(mask, (1, 0), value=True)
        return Embedded(vector, tokens, mask)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the weights as those of the timestep's two layers."""
        self.tokens.initialize(generator)
        if self.pooled is not None:
            self.pooled.initialize(generator)

    def example(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return zeros of the shapes that `embed` takes, without padding."""
        made = {
            TOKENS: torch.zeros(batch, self._length, self._dim, device=device),
            MASK: torch.ones(batch, self._length, dtype=torch.bool, device=device),
        }
        if self._pooled_dim:
            made[POOLED] = torch.zeros(batch, self._pooled_dim, device=device)
        return made


def _require(num_classes: int, **sizes: int | None) -> None:
    if num_classes:
        raise ValueError(f"model.num_classes is {num_classes}, but a network of text embeds no classes; leave it out.")
    for name, value in sizes.items():
        if value is None:
            raise ValueError(
                f"model.embedding.{name} is not given; it follows from the shards with data/condition=text, or give "
                "that of the text encoder."
            )
        if not 1 <= value <= _MOST[name]:
            raise ValueError(
                f"model.embedding.{name} is {value}, but it must be from 1 to {_MOST[name]}; give that of the text "
                "encoder."
            )
