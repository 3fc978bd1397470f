"""Align a network with features of a pretrained one while it trains: REPA (Yu et al. 2024, arXiv 2410.06940)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from core.batch import FEATURES, WEIGHT
from model.network import Network
from model.training_head import Projector, attach_head

_SEED_OFFSET = 2**32  # the projector's weights have another seed than the network's


def unaligned() -> None:
    """Return nothing: the network is trained by its objective alone."""


@dataclass(frozen=True)
class REPA:
    """Adds ``coefficient`` times a loss: minus the cosine between projected tokens and the teacher's, mean over tokens.

    An MLP with two layers of ``hidden`` projects the image's tokens after ``block``. With ``stop_after``, the loss
    counts in the first so many steps only. ``dim`` is D of the teacher's features, which follows from the shards.
    Raises ValueError for numbers out of range.
    """

    block: int = 8  # from 1
    hidden: int = 2048
    coefficient: float = 0.5
    stop_after: int | None = None  # steps
    dim: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("hidden", 1), ("stop_after", 1), ("dim", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"alignment.{name} is {value}, but it must be at least {least}; set it higher.")
        if not self.coefficient > 0:
            raise ValueError(
                f"alignment.coefficient is {self.coefficient}, but it must be above 0; use train/alignment=none to "
                "train without."
            )

    def projector(self, network: Network) -> Projector:
        """Return a projector for the network. Raises ValueError where it has no such block."""
        assert self.dim is not None, "dim follows from the shards"
        _, width = network.token_shape(self.block)
        return Projector(width, self.hidden, self.dim)

    def attach(self, network: Network, seed: int) -> None:
        """Add a new projector to the network, which then returns (prediction, projected tokens [B, T, D])."""
        projector = self.projector(network)
        projector.initialize(torch.Generator().manual_seed(seed + _SEED_OFFSET))
        attach_head(network, self.block, projector)

    def losses(self, projected: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the loss [B] float32 of projected tokens [B, T, D] against a batch's targets."""
        ours, theirs = (F.normalize(tokens.float(), dim=-1) for tokens in (projected, targets[FEATURES]))
        return -(ours * theirs).sum(dim=-1).mean(dim=-1) * targets[WEIGHT]
