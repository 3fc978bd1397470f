"""Compute and size of a network from its config alone.

The paper's "Gflops" are giga multiply-adds (GMACs) of one forward pass of one image without guidance; true
FLOPs are twice that. They are counted in one forward pass without memory: every matrix product, attention with scores
and values. Not counted: additions of biases and residuals, norms, activations, look-ups.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.network import Network

# A backward pass costs about twice the forward pass (paper, section 5, "training compute").
TRAINING_FACTOR = 3

NetworkT = TypeVar("NetworkT", bound=Network)


def weightless(make: Callable[[], NetworkT]) -> NetworkT:
    """Return the network that ``make`` makes, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return make()


def multiply_adds(network: Network) -> int:
    """Multiply-adds (MACs) of one image's forward pass without guidance, wherever the network's weights are."""
    twin = weightless(network.twin)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(*twin.example_inputs(1))
    return int(counter.get_total_flops()) // 2


def cost_of_call(network: Any) -> int:
    """Return the multiply-adds of one call of a network for an image."""
    assert isinstance(network, Network)
    return multiply_adds(network)


def num_parameters(network: Network) -> int:
    """Parameters as the paper counts them: fixed tables, such as the position embedding, are included."""
    twin = weightless(network.twin)
    return sum(tensor.numel() for tensor in (*twin.parameters(), *twin.tables()))


def training_multiply_adds(network: Network, images_seen: int) -> int:
    """Training compute in the paper's sense (Figure 9): forward cost x images seen x 3, in multiply-adds."""
    return TRAINING_FACTOR * multiply_adds(network) * images_seen
