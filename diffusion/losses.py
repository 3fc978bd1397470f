"""The training loss L_simple + L_vlb with a learned variance (paper, section 3.1; Nichol & Dhariwal 2021).

The variational term is in bits and sees the mean through a stopped gradient, so it trains only the variance.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.process import Gaussian, GaussianDiffusion


class Losses(NamedTuple):
    """Per-sample losses, [B] float32."""

    mse: Tensor  # L_simple: mean squared error of the noise prediction
    vlb: Tensor  # L_vlb: one term of the variational bound, bits per dimension
    total: Tensor  # their sum, what is minimised


def diffusion_losses(
    process: GaussianDiffusion, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> Losses:
    """Losses of a network's output at x_t = q_sample(x_0, t, noise).

    output [B, 2c, h, w]; x_0, x_t, noise [B, c, h, w]; t [B] int64.
    """
    output = output.float()
    predicted, logits = process.variance.split(output, x_0.shape[1])
    mse = _mean_per_sample((noise - predicted) ** 2)
    if logits is None:
        return Losses(mse, torch.zeros_like(mse), mse)
    frozen_mean = torch.cat([predicted.detach(), logits], dim=1)
    vlb = vlb_term(process, frozen_mean, x_0, x_t, t)
    return Losses(mse, vlb, mse + vlb)


def vlb_term(process: GaussianDiffusion, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """One term of the variational bound, [B] bits per dimension (Ho et al. 2020, equations 5 and 13).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) by the discretised decoder
    at t = 0.
    """
    true, model = process.q_posterior(x_0, x_t, t), process.p_reverse(output, x_t, t)
    divergence = _mean_per_sample(gaussian_kl(true, model))
    decoder = -_mean_per_sample(discretized_log_likelihood(x_0, model))
    return torch.where(t == 0, decoder, divergence) / math.log(2.0)


def gaussian_kl(first: Gaussian, second: Gaussian) -> Tensor:
    """KL divergence of diagonal Gaussians in nats, per element: [B, c, h, w]."""
    return 0.5 * (
        second.log_variance
        - first.log_variance
        - 1.0
        + torch.exp(first.log_variance - second.log_variance)
        + (first.mean - second.mean) ** 2 * torch.exp(-second.log_variance)
    )


def discretized_log_likelihood(x: Tensor, gaussian: Gaussian) -> Tensor:
    """Log-probability in nats of the 8-bit bin around x in [-1, 1], per element (Ho et al. 2020, eq. 13).

    The normal's distribution function is ADM's tanh approximation, so that losses equal ADM's.
    """
    centred = x - gaussian.mean
    inverse_std = torch.exp(-0.5 * gaussian.log_variance)
    upper = _approximate_normal_cdf(inverse_std * (centred + 1.0 / 255.0))
    lower = _approximate_normal_cdf(inverse_std * (centred - 1.0 / 255.0))
    floor = 1e-12
    inside = torch.log((upper - lower).clamp(min=floor))
    below = torch.log(upper.clamp(min=floor))  # the lowest bin reaches to -infinity
    above = torch.log((1.0 - lower).clamp(min=floor))  # the highest to +infinity
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))


def _approximate_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's distribution function (Page 1977)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _mean_per_sample(values: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return values.flatten(1).mean(dim=1)
