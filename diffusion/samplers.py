"""Samplers turn noise into samples with any denoiser. They are given all noise, and few read anything back.

A sampler is a frozen dataclass of its settings, which a YAML in ``conf/diffusion/sampler`` names. A new sampler needs
such a class, its YAML and a test. Here are those of the Gaussian process; others are in ``ode_samplers``,
``sde_samplers``, ``edm_sampler`` and ``diffusers_samplers``.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.continuous import ContinuousObjective
from diffusion.objective import Objective, predict
from diffusion.process import GaussianDiffusion
from diffusion.respacing import Steps, kept_steps, number_of


class Noise(Protocol):
    """Standard normals of a batch of images, one tensor per draw."""

    def __call__(self, draw: int) -> Tensor:
        """Return the draw'th tensor [B, c, h, w] float32; draw 0 is the start x_T, draw i the i-th step's."""
        ...


class Sampler(Protocol):
    """Turns noise into samples."""

    name: ClassVar[str]  # in records and file names
    reads_device: ClassVar[bool]  # whether its steps depend on values that it reads from the device

    def require(self, objective: Objective) -> None:
        """Raise ValueError where this sampler cannot sample from the objective's networks with its settings."""
        ...

    def calls(self) -> int | None:
        """Return how often the denoiser is called for an image, or None where only sampling can tell."""
        ...

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples of x_0, [B, c, h, w] float32. The noise decides B; the condition has as many rows."""
        ...


def step_of_rows(x: Tensor, step: int) -> Tensor:
    """Return a step as the t of every row of x: [B] int64."""
    return torch.full((len(x),), step, dtype=torch.int64, device=x.device)


@dataclass(frozen=True)
class GaussianSampler:
    """The settings and refusals that samplers of the Gaussian process share; ``steps`` as in `kept_steps`."""

    name: ClassVar[str]
    reads_device: ClassVar[bool] = False
    steps: Steps = 250

    def process(self, objective: Objective) -> GaussianDiffusion:
        """Return the objective's process. Raises ValueError for another objective."""
        if not isinstance(objective, GaussianDiffusion):
            instead = "edm_heun" if isinstance(objective, ContinuousObjective) and objective.has_levels else "heun_ode"
            raise ValueError(
                f"sampler {self.name} needs diffusion=gaussian, but the objective is diffusion={objective.name}; use "
                f"diffusion/sampler={instead}."
            )
        return objective

    def require(self, objective: Objective) -> None:
        """Raise ValueError for another objective, or for steps that its process does not have (see `kept_steps`)."""
        kept_steps(self.process(objective).num_steps, self.steps)

    def calls(self) -> int:
        """Return the number of steps."""
        return number_of(self.steps)


@dataclass(frozen=True)
class DDPM(GaussianSampler):
    """Ancestral sampling over respaced steps (Ho et al. 2020, algorithm 2)."""

    name: ClassVar[str] = "ddpm"
    steps: Steps = 250

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        process = self.process(objective)
        respaced = process.respace(kept_steps(process.num_steps, self.steps))
        x = noise(0)
        for draw, step in enumerate(reversed(range(respaced.num_steps)), start=1):
            t = step_of_rows(x, step)
            reverse = respaced.p_reverse(predict(denoiser, respaced, x, t, condition), x, t)
            x = reverse.mean
            if step > 0:  # the last step returns the mean
                x = x + torch.exp(0.5 * reverse.log_variance) * noise(draw)
        return x


@dataclass(frozen=True)
class DDIM(GaussianSampler):
    """Implicit sampling (Song et al. 2020, equation 12); ``eta`` 0 is deterministic, 1 is ancestral.

    Raises ValueError for an ``eta`` outside [0, 1].
    """

    name: ClassVar[str] = "ddim"
    steps: Steps = 50
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sampler.eta is {self.eta}, but it must be between 0 (deterministic) and 1 (ancestral).")

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        process = self.process(objective)
        respaced = process.respace(kept_steps(process.num_steps, self.steps))
        x = noise(0)
        for draw, step in enumerate(reversed(range(respaced.num_steps)), start=1):
            t = step_of_rows(x, step)
            predicted = predict(denoiser, respaced, x, t, condition)
            alpha, previous = respaced.table("alphas_cumprod", t), respaced.table("alphas_cumprod_prev", t)
            sigma = self.eta * torch.sqrt((1 - previous) / (1 - alpha)) * torch.sqrt(1 - alpha / previous)
            x = torch.sqrt(previous) * predicted.x_0 + torch.sqrt(1 - previous - sigma**2) * predicted.noise
            if self.eta > 0 and step > 0:
                x = x + sigma * noise(draw)
        return x
