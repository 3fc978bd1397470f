"""Samplers of the diffusers library, behind our interface. Their solvers are used unchanged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.flow import Flow
from diffusion.objective import Objective
from diffusion.paths import LinearPath
from diffusion.process import GaussianDiffusion
from diffusion.samplers import GaussianSampler, Noise
from diffusion.time_grids import require_shift, velocity


@dataclass(frozen=True)
class DiffusersSampler(GaussianSampler):
    """The refusals of solvers that interpret the network's output themselves."""

    predictions: ClassVar[Mapping[str, str]]  # diffusers' name of each prediction that the solver interprets

    def process(self, objective: Objective) -> GaussianDiffusion:
        """Return the objective's process. Raises ValueError for another objective or prediction."""
        process = super().process(objective)
        if process.parameterization.name not in self.predictions:
            raise ValueError(
                f"sampler {self.name} of diffusers needs diffusion/prediction={' or '.join(self.predictions)}, but the "
                f"objective has diffusion/prediction={process.parameterization.name}; use diffusion/sampler=ddim."
            )
        return process


@dataclass(frozen=True)
class DPMSolverPP(DiffusersSampler):
    """DPM-Solver++ multistep (Lu et al. 2022, algorithm 2): one call of the network per step.

    Raises ValueError for an order that is not 1, 2 or 3.
    """

    name: ClassVar[str] = "dpm_solver_pp"
    predictions: ClassVar[Mapping[str, str]] = {"noise": "epsilon", "x_0": "sample", "v": "v_prediction"}
    steps: int = 25
    order: int = 2

    def __post_init__(self) -> None:
        _require_order(self.order)

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        from diffusers import DPMSolverMultistepScheduler

        process = self.process(objective)
        scheduler = DPMSolverMultistepScheduler(
            trained_betas=process.tables.betas,
            algorithm_type="dpmsolver++",
            solver_order=self.order,
            prediction_type=self.predictions[process.parameterization.name],
        )
        return _run(scheduler, denoiser, process, noise, condition, self.steps)


@dataclass(frozen=True)
class Heun(DiffusersSampler):
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two calls per step, except the last."""

    name: ClassVar[str] = "heun"
    predictions: ClassVar[Mapping[str, str]] = {"noise": "epsilon", "v": "v_prediction"}
    steps: int = 25

    def calls(self) -> int:
        """Return two calls per step, and one for the last step."""
        return 2 * self.steps - 1

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        from diffusers import HeunDiscreteScheduler

        process = self.process(objective)
        scheduler = HeunDiscreteScheduler(
            trained_betas=process.tables.betas, prediction_type=self.predictions[process.parameterization.name]
        )
        return _run(scheduler, denoiser, process, noise, condition, self.steps)


@dataclass(frozen=True)
class FlowDPMSolverPP:
    """DPM-Solver++ multistep for the straight line from data to noise: one call of the network per step.

    ``shift`` moves times toward the noise. diffusers' solver starts at t = 0.999, since at 1 the ratio of signal to
    noise is 0. Raises ValueError for an order that is not 1, 2 or 3, and for fewer than two steps.
    """

    name: ClassVar[str] = "flow_dpm_solver_pp"
    reads_device: ClassVar[bool] = False
    steps: int = 25
    order: int = 2
    shift: float = 1.0

    def __post_init__(self) -> None:
        _require_order(self.order)
        if self.steps < 2:
            raise ValueError(f"sampler.steps is {self.steps}, but {self.name} needs at least 2 steps; set it higher.")

    def require(self, objective: Objective) -> None:
        """Raise ValueError for another objective than a flow on the straight line."""
        require_shift(self.shift, _require_line(objective))

    def calls(self) -> int:
        """Return the number of steps."""
        return self.steps

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        from diffusers import DPMSolverMultistepScheduler

        flow, x = _require_line(objective), noise(0)
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shift, solver_order=self.order
        )
        scheduler.set_timesteps(self.steps)
        scheduler.set_begin_index(0)  # its timesteps are rounded, and two may be equal
        for step, t in enumerate(scheduler.sigmas[:-1].tolist()):
            slope = velocity(denoiser, flow, x, t, condition)
            x = scheduler.step(slope, scheduler.timesteps[step], x).prev_sample
        return x


def _require_line(objective: Objective) -> Flow:
    if not isinstance(objective, Flow) or not isinstance(objective.path, LinearPath):
        path = f" diffusion/path={objective.path.name}" if isinstance(objective, Flow) else ""
        instead = "heun_ode" if path else "edm_heun" if objective.name == "edm" else "dpm_solver_pp"
        raise ValueError(
            f"sampler {FlowDPMSolverPP.name} needs diffusion=flow diffusion/path=linear, but the objective is "
            f"diffusion={objective.name}{path}; use diffusion/sampler={instead}."
        )
    return objective


def _require_order(order: int) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"sampler.order is {order}, but DPM-Solver++ has 1, 2 and 3; 2 is the usual one.")


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
