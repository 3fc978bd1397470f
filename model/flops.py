"""Compute and size of a DiT from its config alone.

The paper's "Gflops" are giga multiply-adds (GMACs) of one forward pass of one image without guidance; true
FLOPs are twice that. They are counted in one forward pass without memory: every matrix product, attention with scores
and values. Not counted: additions of biases and residuals, norms, activations, look-ups.
"""

from dataclasses import fields
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.dit import DiT, DiTConfig

# A backward pass costs about twice the forward pass (paper, section 5, "training compute").
TRAINING_FACTOR = 3


def constructor_arguments(config: DiTConfig) -> dict[str, Any]:
    """What builds a DiT of this config."""
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _shape_only(config: DiTConfig) -> DiT:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return DiT(**constructor_arguments(config))


def multiply_adds(config: DiTConfig) -> int:
    """Multiply-adds (MACs) of one image's forward pass without guidance."""
    model = _shape_only(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*model.example_inputs(1))
    return int(counter.get_total_flops()) // 2


def cost_of_call(network: Any) -> int:
    """Return the multiply-adds of one call of a network for an image."""
    return multiply_adds(network.config)


def num_parameters(config: DiTConfig) -> int:
    """Parameters as the paper counts them: the frozen position embedding is included."""
    model = _shape_only(config)
    return sum(p.numel() for p in model.parameters()) + config.num_tokens * config.width


def training_multiply_adds(config: DiTConfig, images_seen: int) -> int:
    """Training compute in the paper's sense (Figure 9): forward cost x images seen x 3, in multiply-adds."""
    return TRAINING_FACTOR * multiply_adds(config) * images_seen
