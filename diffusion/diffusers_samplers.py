"""Samplers of the diffusers library, behind our interface. Their solvers are used unchanged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.objective import Objective
from diffusion.process import GaussianDiffusion
from diffusion.samplers import GaussianSampler, Noise


@dataclass(frozen=True)
class DiffusersSampler(GaussianSampler):
    """The refusals that samplers of diffusers share."""

    types: ClassVar[Mapping[str, str]]  # diffusers' names of the predictions that the solver reads

    def require(self, objective: Objective) -> None:
        """Raise as `GaussianSampler`, and ValueError for a network whose prediction the solver cannot read."""
        super().require(objective)
        prediction = self.process(objective).parameterization.name
        if prediction not in self.types:
            raise ValueError(
                f"sampler {self.name} reads predictions of {', '.join(self.types)}, but the objective has "
                f"diffusion/prediction={prediction}; use diffusion/sampler=ddim."
            )


@dataclass(frozen=True)
class DPMSolverPP(DiffusersSampler):
    """DPM-Solver++ multistep (Lu et al. 2022, algorithm 2): one call of the network per step.

    Raises ValueError for an order that is not 1, 2 or 3.
    """

    name: ClassVar[str] = "dpm_solver_pp"
    types: ClassVar[Mapping[str, str]] = {"noise": "epsilon", "x_0": "sample", "v": "v_prediction"}
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
            trained_betas=process.tables.betas,
            algorithm_type="dpmsolver++",
            solver_order=self.order,
            prediction_type=self.types[process.parameterization.name],
        )
        return _run(scheduler, denoiser, process, noise, condition, self.steps)


@dataclass(frozen=True)
class Heun(DiffusersSampler):
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two calls per step, except the last."""

    name: ClassVar[str] = "heun"
    types: ClassVar[Mapping[str, str]] = {"noise": "epsilon", "v": "v_prediction"}
    steps: int = 25

    def calls(self) -> int:
        """Return two calls per step, and one for the last step."""
        return 2 * self.steps - 1

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        from diffusers import HeunDiscreteScheduler

        process = self.process(objective)
        scheduler = HeunDiscreteScheduler(
            trained_betas=process.tables.betas, prediction_type=self.types[process.parameterization.name]
        )
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
