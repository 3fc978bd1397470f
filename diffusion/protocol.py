"""The interface between objectives, samplers and a network."""

from typing import Protocol

from torch import Tensor

from core.batch import Condition


class Denoiser(Protocol):
    """A network that knows no schedule, no guidance and drops no condition."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return what the objective asks for: [B, k c, h, w], where k is its ``outputs_per_channel``.

        x_t is [B, c, h, w] float, t [B] int64 or float, the condition has B rows.
        """
        ...
