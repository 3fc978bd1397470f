"""The variance of the reverse step, from the network's output or fixed."""

from typing import Protocol

import torch
from torch import Tensor


class Variance(Protocol):
    """Chooses log sigma_t^2 of p(x_{t-1} | x_t)."""

    outputs_per_channel: int  # of the network: 2 where it predicts the variance, else 1

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Return the noise prediction [B, c, h, w] in a network's output, and variance logits of that shape or None."""
        ...

    def log_variance(self, logits: Tensor | None, log_beta_tilde: Tensor, log_beta: Tensor, t: Tensor) -> Tensor:
        """Return the log-variance, which broadcasts with x_t, from logits, the two bounds [B, 1, 1, 1] and t [B]."""
        ...


class LearnedRangeVariance:
    """Interpolation between the bounds beta~_t and beta_t (Nichol & Dhariwal 2021, equation 15).

    The logit v in [-1, 1] becomes the fraction (v + 1) / 2; the network is free to leave that range.
    """

    outputs_per_channel = 2

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Return noise and logits of an output [B, 2c, h, w]."""
        assert output.shape[1] == 2 * channels, "the network is built from the objective"
        noise, logits = output.split(channels, dim=1)
        return noise, logits

    def log_variance(self, logits: Tensor | None, log_beta_tilde: Tensor, log_beta: Tensor, t: Tensor) -> Tensor:
        """Return the log-variance [B, c, h, w] of logits of that shape."""
        assert logits is not None
        fraction = (logits + 1) / 2
        return fraction * log_beta + (1 - fraction) * log_beta_tilde


class _FixedVariance:
    outputs_per_channel = 1

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, c, h, w] itself and no logits."""
        assert output.shape[1] == channels, "the network is built from the objective"
        return output, None


class FixedLargeVariance(_FixedVariance):
    """sigma_t^2 = beta_t (Ho et al. 2020, section 3.2)."""

    def log_variance(self, logits: Tensor | None, log_beta_tilde: Tensor, log_beta: Tensor, t: Tensor) -> Tensor:
        """Return the upper bound [B, 1, 1, 1]; at the first step the lower one, as ADM does for a better likelihood."""
        return torch.where(t.view(-1, 1, 1, 1) == 0, log_beta_tilde, log_beta)


class FixedSmallVariance(_FixedVariance):
    """sigma_t^2 = beta~_t (Ho et al. 2020, section 3.2)."""

    def log_variance(self, logits: Tensor | None, log_beta_tilde: Tensor, log_beta: Tensor, t: Tensor) -> Tensor:
        """Return the lower bound [B, 1, 1, 1]."""
        return log_beta_tilde
