"""What the process asks of a network."""

from typing import Protocol

from torch import Tensor


class Denoiser(Protocol):
    """A network without schedule, guidance or label dropping inside."""

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Predict the noise, then the variance logits where they are learned.

        [B, c, h, w] float, [B] int64 or float, [B] int64 in [0, num_classes] (num_classes is the null
        class) -> [B, 2c, h, w], or [B, c, h, w] where the variance is fixed.
        """
        ...
