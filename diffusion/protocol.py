"""What the process asks of a network."""

from typing import Protocol

from torch import Tensor

from diffusion.batch import Condition


class Denoiser(Protocol):
    """A network without schedule, guidance or dropping of conditions inside."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the noise, then the variance logits where they are learned.

        [B, c, h, w] float, [B] int64 or float, a condition of B rows -> [B, 2c, h, w], or [B, c, h, w] where the
        variance is fixed.
        """
        ...
