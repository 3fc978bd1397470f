"""Activation checkpointing: less memory for a third more compute. Leaves the network's maths and names alone."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from model.dit import DiT


def checkpoint_blocks(model: DiT) -> None:
    """Keep only each block's input for the backward pass and compute the rest of it again there."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
