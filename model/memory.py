"""Compute the memory that training a network takes, from its config alone."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.network import Network

# float32 weights, gradients, two AdamW moments and one moving average.
STATE_BYTES_PER_PARAMETER = {"weights": 4, "gradients": 4, "optimizer": 8, "ema": 4}


def activation_bytes_per_image(network: Network, bf16: bool) -> int:
    """Return the bytes that each image of a batch keeps for the backward pass, without activation checkpointing.

    There is no formula: fake tensors pass through the network, and the sizes of what autograd saves are added up. A
    compiler, or an attention kernel other than the CPU's flash one, may keep less or more.
    """
    return _saved_bytes(network, bf16, 2) - _saved_bytes(network, bf16, 1)  # the difference excludes the weights


def _saved_bytes(network: Network, bf16: bool, batch_size: int) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        model = network.twin()
        inputs = model.example_inputs(batch_size)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            output = model(*inputs)  # kept alive: a freed storage's address may be used again
        total = sum(storages.values())
        del output
    return total
