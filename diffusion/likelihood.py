"""The variational bound on the likelihood of data, in bits per dimension."""

import math

import torch
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.gaussians import Gaussian, gaussian_kl
from diffusion.objective import mean_per_sample, predict
from diffusion.process import GaussianDiffusion
from diffusion.samplers import Noise, step_of_rows


def bits_per_dimension(
    denoiser: Denoiser, process: GaussianDiffusion, x_0: Tensor, condition: Condition, noise: Noise
) -> Tensor:
    """Return an upper bound on the negative log-likelihood of x_0 [B, c, h, w]: [B] bits per dimension.

    The sum of all terms of the bound (Ho et al. 2020, equation 5): the prior's, one for each step of the
    process, the last with the discretized decoder of 8-bit data in [-1, 1]. ``noise(i)`` is drawn for step i.
    """
    total = prior_bits(process, x_0)
    for step in reversed(range(process.num_steps)):
        t = step_of_rows(x_0, step)
        alpha, sigma = process.alpha_sigma(t)
        x_t = alpha * x_0 + sigma * noise(step)
        total = total + process.vlb_term(predict(denoiser, process, x_t, t, condition), x_0, x_t, t)
    return total


def prior_bits(process: GaussianDiffusion, x_0: Tensor) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, 1)): [B] bits per dimension. Nearly zero for a schedule that ends in noise."""
    alpha, sigma = process.alpha_sigma(step_of_rows(x_0, process.num_steps - 1))
    mean = alpha * x_0
    normal = Gaussian(torch.zeros_like(mean), torch.zeros_like(mean))
    return mean_per_sample(gaussian_kl(Gaussian(mean, 2 * torch.log(sigma)), normal)) / math.log(2.0)
