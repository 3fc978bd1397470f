"""Samplers of the diffusers library, behind our interface. Their solvers are used unchanged."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.objective import Objective
from diffusion.process import GaussianDiffusion
from diffusion.samplers import GaussianSampler, Noise


@dataclass(frozen=True)
class DPMSolverPP(GaussianSampler):
    """DPM-Solver++ multistep (Lu et al. 2022, algorithm 2): one call of the network per step.

    Raises ValueError for an order that is not 1, 2 or 3.
    """

    name: ClassVar[str] = "dpm_solver_pp"
    steps: int = 25
    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"sampler.order is {self.order}, but DPM-Solver++ has 1, 2 and 3; 2 is the usual one.")

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        from diffusers import DPMSolverMultistepScheduler

        process = self.process(objective)
        scheduler = DPMSolverMultistepScheduler(
            trained_betas=process.tables.betas, algorithm_type="dpmsolver++", solver_order=self.order
        )
        return _run(scheduler, denoiser, process, noise, condition, self.steps)


@dataclass(frozen=True)
class Heun(GaussianSampler):
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two calls per step, except the last."""

    name: ClassVar[str] = "heun"
    steps: int = 25

    def calls(self) -> int:
        """Return two calls per step, and one for the last step."""
        return 2 * self.steps - 1

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        from diffusers import HeunDiscreteScheduler

        process = self.process(objective)
        scheduler = HeunDiscreteScheduler(trained_betas=process.tables.betas)
        return _run(scheduler, denoiser, process, noise, condition, self.steps)


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
