"""Compute the memory that training a network takes, from its config alone."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.network import Network

# float32 weights, gradients, two AdamW moments and one moving average.
STATE_BYTES_PER_PARAMETER = {"weights": 4, "gradients": 4, "optimizer": 8, "ema": 4}
OLD_WEIGHTS_BYTES_PER_PARAMETER = 4  # a copy of the weights at log steps


class Saved(NamedTuple):
    """The bytes that a forward pass keeps for the backward pass, without activation checkpointing."""

    per_image: int  # activations
    casts: int  # the weights' copies in bf16


def saved_bytes(network: Network, bf16: bool) -> Saved:
    """Return what a forward pass of the network keeps.

    There is no formula: fake tensors pass through the network, and the sizes of what autograd saves are added up. A
    compiler, or another attention kernel, may keep less or more.
    """
    of_one, of_two = (_bytes_of_batch(network, bf16, size) for size in (1, 2))
    per_image = of_two - of_one
    return Saved(per_image, of_one - per_image if bf16 else 0)  # in fp32, the rest is the weights themselves


def step_bytes(saved: Saved, images: int, num_parameters: int) -> int:
    """Return the most bytes that a training step of so many images holds at a time.

    That is either before the backward pass, in which gradients take the place of activations: all of the state but
    gradients, and what the forward pass saved. Or it is after it, at a log step: all of the state, and the old weights,
    from which the norm of the update is computed. The few values of the loss itself are not counted.
    """
    state = sum(STATE_BYTES_PER_PARAMETER.values())
    before = (state - STATE_BYTES_PER_PARAMETER["gradients"]) * num_parameters
    before += saved.casts + images * saved.per_image
    return max(before, (state + OLD_WEIGHTS_BYTES_PER_PARAMETER) * num_parameters)


def _bytes_of_batch(network: Network, bf16: bool, batch_size: int) -> int:
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
