"""What a training step eats."""

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict):
    """Samples with the random numbers of their visit: a process's share of a step's global batch."""

    latent: Tensor  # [B, c, h, w] float32, x_0, scaled by the autoencoder's factor
    label: Tensor  # [B] int64, already num_classes where the label was dropped
    t: Tensor  # [B] int64
    noise: Tensor  # [B, c, h, w] float32
