"""Compute the cost and size of a network from its config alone.

The paper's "Gflops" are giga multiply-adds (GMACs) of one forward pass of one image without guidance; true
FLOPs are twice that. They are counted in a forward pass on the meta device: every matrix product, and attention's
products with scores and values. Biases, residual additions, norms, activations and look-ups are not counted.
"""

from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model.network import Network

# A backward pass costs about twice the forward pass (paper, section 5, "training compute").
TRAINING_FACTOR = 3

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_ONE_COUNT = Lock()  # counts of two threads at a time would leave a flag of PyTorch set, and nothing is compiled then
_counts: WeakKeyDictionary[Network, int] = WeakKeyDictionary()


def weightless(make: Callable[[], ModuleT]) -> ModuleT:
    """Return the module that ``make`` makes, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return make()


def multiply_adds(network: Network) -> int:
    """Return the multiply-adds (MACs) of one image's forward pass without guidance, on whatever device weights are.

    They are counted once for a network: an evaluation asks three times.
    """
    if network not in _counts:
        _counts[network] = _counted(network)
    return _counts[network]


def _counted(network: Network) -> int:
    twin = weightless(network.twin)
    return multiply_adds_of(twin, *twin.example_inputs(1))


def multiply_adds_of(module: nn.Module, *inputs: Any) -> int:
    """Return the multiply-adds of a module on the meta device for these inputs."""
    with _ONE_COUNT, FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops()) // 2


def cost_of_call(network: Any) -> int:
    """Return the multiply-adds of one call of a network for one image."""
    assert isinstance(network, Network)
    return multiply_adds(network)


def num_parameters(network: Network) -> int:
    """Return the number of parameters as the paper counts them: with fixed tables such as the position embedding."""
    twin = weightless(network.twin)
    return sum(tensor.numel() for tensor in (*twin.parameters(), *twin.tables()))


def training_multiply_adds(network: Network, images_seen: int) -> int:
    """Return training compute as in the paper (Figure 9): forward cost x images seen x 3, in multiply-adds."""
    return TRAINING_FACTOR * multiply_adds(network) * images_seen
