"""Attach a head to a network for training, which reads the image's tokens after one unit; sampling has none of it."""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import initialize_linears
from model.network import Network

HEAD = "training_head"  # name of the head's module in the network that is trained


class Projector(nn.Sequential):
    """REPA's head: an MLP of three linear maps with SiLU between them, token by token, [B, T, d] -> [B, T, D]."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )

    def initialize(self, generator: torch.Generator) -> None:
        """Draw Xavier-uniform weights and set biases to zero, as in the network."""
        initialize_linears(self, generator)


def attach_head(network: Network, unit: int, head: nn.Module) -> None:
    """Let ``network`` return (prediction, head(tokens after ``unit``)), with units counted from 1.

    It then holds the head's weights; its own keep their names. Raises ValueError as `Network.token_shape` does.
    """
    network.token_shape(unit)

    def forward(network: Network, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        prediction, tokens = network.with_tokens(x_t, t, condition, unit)
        return prediction, network.get_submodule(HEAD)(tokens)

    network.add_module(HEAD, head)
    # One method of the whole network, so that runtimes that wrap or shard it see both results.
    network.forward = MethodType(forward, network)  # type: ignore[method-assign]


def without_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the network itself, by name, of one that may have had a head."""
    return {name: value for name, value in tensors.items() if not name.startswith(f"{HEAD}.")}
