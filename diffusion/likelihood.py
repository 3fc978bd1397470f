"""Likelihoods of data in bits per dimension: the variational bound of the process, and that by the ODE of a flow."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.continuous import ContinuousObjective
from diffusion.gaussians import Gaussian, gaussian_kl
from diffusion.objective import mean_per_sample, predict
from diffusion.process import GaussianDiffusion
from diffusion.samplers import Noise, step_of_rows
from diffusion.time_grids import even_times, noise_levels, velocity


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


def ode_bits_per_dimension(
    denoiser: Denoiser, objective: ContinuousObjective, x_0: Tensor, condition: Condition, noise: Noise, steps: int
) -> Tensor:
    """Return the negative log-likelihood of x_0 [B, c, h, w] by the objective's ODE: [B] bits per dimension.

    log p(x_0) = log p(x_1) + the integral of the velocity's divergence along the ODE (Chen et al. 2018, equation 8), by
    Heun's method in ``steps`` steps. The divergence is Hutchinson's estimate with probes of +-1, the signs of
    ``noise(i)`` in step i. The density is multiplied by 2 / 255, the width of a bin of 8-bit data in [-1, 1], as in the
    variational bound.
    """
    times = _times_to_noise(objective, steps)
    x, log_volume = x_0, torch.zeros(len(x_0), device=x_0.device)
    for step, (t, next_t) in enumerate(pairwise(times)):
        probe, h = torch.where(noise(step) < 0, -1.0, 1.0), next_t - t
        first, divergence = _rate(denoiser, objective, x, t, condition, probe)
        second, next_divergence = _rate(denoiser, objective, x + h * first, next_t, condition, probe)
        x = x + h * (first + second) / 2
        log_volume = log_volume + h * (divergence + next_divergence) / 2
    std = times[-1] if objective.has_levels else 1.0  # with which samplers start
    log_prior = -0.5 * (x / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    log_density = mean_per_sample(log_prior) + log_volume / x[0].numel()
    return -(log_density + math.log(2 / 255)) / math.log(2.0)


def _times_to_noise(objective: ContinuousObjective, steps: int) -> list[float]:
    """Return ``steps`` + 1 ascending times."""
    low, high = objective.sampling_interval
    descending = noise_levels(low, high, steps + 1)[:-1] if objective.has_levels else even_times((high, low), steps)
    return descending[::-1]


def _rate(
    denoiser: Denoiser, objective: ContinuousObjective, x: Tensor, t: float, condition: Condition, probe: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the velocity [B, c, h, w] at x, and Hutchinson's estimate of its divergence [B]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        found = velocity(denoiser, objective, x, t, condition)
        (gradient,) = torch.autograd.grad((found * probe).sum(), x)
    return found.detach(), (gradient * probe).flatten(1).sum(dim=1)
