"""Samplers of the diffusers library, behind our interface. Their solvers are used as they are."""

from typing import Any

import torch
from torch import Tensor

from diffusion.batch import Condition
from diffusion.process import GaussianDiffusion
from diffusion.protocol import Denoiser
from diffusion.samplers import Noise


def dpm_solver_pp(
    denoiser: Denoiser, process: GaussianDiffusion, noise: Noise, condition: Condition, steps: int = 25, order: int = 2
) -> Tensor:
    """DPM-Solver++ multistep (Lu et al. 2022, algorithm 2): one call of the network a step; [B, c, h, w].

    Raises ValueError for an order that is not 1, 2 or 3.
    """
    from diffusers import DPMSolverMultistepScheduler

    if order not in (1, 2, 3):
        raise ValueError(f"sampler.order is {order}, but DPM-Solver++ has 1, 2 and 3; 2 is the usual one.")
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=process.tables.betas, algorithm_type="dpmsolver++", solver_order=order
    )
    return _run(scheduler, denoiser, process, noise, condition, steps)


def heun(denoiser: Denoiser, process: GaussianDiffusion, noise: Noise, condition: Condition, steps: int = 25) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two calls of the network a step; [B, c, h, w]."""
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler(trained_betas=process.tables.betas)
    return _run(scheduler, denoiser, process, noise, condition, steps)


def _run(
    scheduler: Any, denoiser: Denoiser, process: GaussianDiffusion, noise: Noise, condition: Condition, steps: int
) -> Tensor:
    """Drive a scheduler of diffusers. Its timesteps stay on the host, so nothing is read from the device."""
    scheduler.set_timesteps(steps)
    x = noise(0) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        network_t = torch.full((len(x),), float(t), device=x.device)
        output = denoiser(scheduler.scale_model_input(x, t), network_t, condition).float()
        predicted, _ = process.variance.split(output, x.shape[1])
        x = scheduler.step(predicted, t, x).prev_sample
    return x
