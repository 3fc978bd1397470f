"""Diagonal Gaussians: their divergence, and the likelihood of 8-bit data under them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """A diagonal Gaussian, whose mean and log-variance broadcast to [B, c, h, w] float32."""

    mean: Tensor
    log_variance: Tensor


def gaussian_kl(first: Gaussian, second: Gaussian) -> Tensor:
    """Return the KL divergence in nats, per element: [B, c, h, w]."""
    return 0.5 * (
        second.log_variance
        - first.log_variance
        - 1.0
        + torch.exp(first.log_variance - second.log_variance)
        + (first.mean - second.mean) ** 2 * torch.exp(-second.log_variance)
    )


def discretized_log_likelihood(x: Tensor, gaussian: Gaussian) -> Tensor:
    """Return the log-probability in nats of the 8-bit bin around x in [-1, 1], per element: [B, c, h, w].

    Source: Ho et al. 2020, equation 13. The normal's distribution function is ADM's tanh approximation, so that losses
    equal ADM's.
    """
    centered = x - gaussian.mean
    inverse_std = torch.exp(-0.5 * gaussian.log_variance)
    upper = _approximate_normal_cdf(inverse_std * (centered + 1.0 / 255.0))
    lower = _approximate_normal_cdf(inverse_std * (centered - 1.0 / 255.0))
    floor = 1e-12
    inside = torch.log((upper - lower).clamp(min=floor))
    below = torch.log(upper.clamp(min=floor))  # the lowest bin reaches to -infinity
    above = torch.log((1.0 - lower).clamp(min=floor))  # the highest to +infinity
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))


def _approximate_normal_cdf(x: Tensor) -> Tensor:
    """Return the tanh approximation of the standard normal's distribution function (Page 1977)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
