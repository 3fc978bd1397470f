"""The variational bound on the likelihood of data, in bits per dimension."""

import math

import torch
from torch import Tensor

from diffusion.batch import Condition
from diffusion.losses import gaussian_kl, vlb_term
from diffusion.process import Gaussian, GaussianDiffusion
from diffusion.protocol import Denoiser
from diffusion.samplers import Noise, step_of_rows


def bits_per_dimension(
    denoiser: Denoiser, process: GaussianDiffusion, x_0: Tensor, condition: Condition, noise: Noise
) -> Tensor:
    """Upper bound on the negative log-likelihood of x_0 [B, c, h, w]: [B] bits per dimension.

    The sum of all terms of the bound (Ho et al. 2020, equation 5): the prior's, one for each step of the
    process, the last with the discretised decoder of 8-bit data in [-1, 1]. ``noise(i)`` is drawn for step i.
    """
    total = prior_bits(process, x_0)
    for step in reversed(range(process.num_steps)):
        t = step_of_rows(x_0, step)
        x_t = process.q_sample(x_0, t, noise(step))
        total = total + vlb_term(process, denoiser(x_t, process.timesteps[t], condition), x_0, x_t, t)
    return total


def prior_bits(process: GaussianDiffusion, x_0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)): [B] bits per dimension. Nearly zero for a schedule that ends in noise."""
    t = torch.full((len(x_0),), process.num_steps - 1, device=x_0.device)
    mean = process.table("sqrt_alphas_cumprod", t) * x_0
    log_variance = 2 * torch.log(process.table("sqrt_one_minus_alphas_cumprod", t))
    normal = Gaussian(torch.zeros_like(mean), torch.zeros_like(mean))
    return gaussian_kl(Gaussian(mean, log_variance), normal).flatten(1).mean(dim=1) / math.log(2.0)
