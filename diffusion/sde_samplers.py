"""Stochastic samplers of continuous objectives (Ma et al. 2024, SiT, section 2.3; arXiv 2401.08740).

For any diffusion coefficient D(t) >= 0, the equation backward in time

    dx = (-velocity + D score) dt + sqrt(2 D) dw

has the same distribution of x_t at every t. The network is called once for velocity and score together.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.continuous import ContinuousObjective
from diffusion.objective import Objective
from diffusion.paths import Coefficients
from diffusion.samplers import Noise
from diffusion.time_grids import at, even_times, require_shift, require_times

Form = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"]
LastStep = Literal["mean", "tweedie", "euler", "none"]


def _sbdm(coefficients: Coefficients, t: float, norm: float) -> Tensor:
    """Return sigma sigma' - sigma^2 alpha' / alpha, half the squared noise rate of the forward process (Song 2021)."""
    assert coefficients.turn is not None
    return norm * coefficients.sigma_by_alpha * coefficients.turn


# D(t) by form, [B, 1, 1, 1]. SiT's time is 1 - t.
DIFFUSIONS: Mapping[str, Callable[[Coefficients, float, float], Tensor]] = {
    "constant": lambda c, t, norm: torch.full_like(c.sigma, norm),
    "sbdm": _sbdm,
    "sigma": lambda c, t, norm: norm * c.sigma,
    "linear": lambda c, t, norm: torch.full_like(c.sigma, norm * t),
    "decreasing": lambda c, t, norm: torch.full_like(c.sigma, (1 - norm * math.cos(math.pi * t)) ** 2 / 4),
    "increasing_decreasing": lambda c, t, norm: torch.full_like(c.sigma, norm * math.sin(math.pi * t) ** 2),
}


@dataclass(frozen=True)
class Local:
    """The equation at one x and t, from one call of the network."""

    coefficients: Coefficients
    x: Tensor  # [B, c, h, w], like the following
    velocity: Tensor
    score: Tensor
    diffusion: Tensor  # [B, 1, 1, 1]

    @property
    def drift(self) -> Tensor:
        """Return -velocity + D score, the mean of dx for a step of 1 toward the data."""
        return -self.velocity + self.diffusion * self.score


@dataclass(frozen=True)
class Equation:
    """The equation of a network and a diffusion coefficient."""

    denoiser: Denoiser
    flow: ContinuousObjective
    condition: Condition
    form: Form
    norm: float

    def diffusion(self, x: Tensor, t: float) -> Tensor:
        """Return D at t, [B, 1, 1, 1]."""
        return DIFFUSIONS[self.form](self.flow.coefficients(at(x, t)), t, self.norm)

    def local(self, x: Tensor, t: float) -> Local:
        """Call the network and return the equation at x [B, c, h, w] and t."""
        rows = at(x, t)
        output = self.denoiser(*self.flow.inputs(x, rows), self.condition)
        velocity, score = self.flow.velocity(output, x, rows), self.flow.score(output, x, rows)
        return Local(self.flow.coefficients(rows), x, velocity, score, self.diffusion(x, t))


# The step of size h from t = h to the data, without noise.
LAST_STEPS: Mapping[str, Callable[[Local, float], Tensor]] = {
    "mean": lambda found, h: found.x + h * found.drift,
    "tweedie": lambda found, h: (
        (found.x + found.coefficients.sigma**2 * found.score) / found.coefficients.alpha
    ),  # E[x_0 | x_t]
    "euler": lambda found, h: found.x - h * found.velocity,
}


@dataclass(frozen=True)
class SdeSampler:
    """The settings and refusals that stochastic samplers share; ``steps`` counts the last one too.

    ``diffusion`` is D(t), scaled by ``norm``. The steps before the last are equal and end at t = ``last_size``, from
    which ``last_step`` goes to the data; with "none" they go there themselves. ``shift`` moves times toward the noise.

    Raises ValueError for values that do not exist, and for fewer than two steps.
    """

    name: ClassVar[str]
    reads_device: ClassVar[bool] = False
    steps: int = 250
    diffusion: Form = "sigma"
    norm: float = 1.0
    last_step: LastStep = "mean"
    last_size: float = 0.04
    shift: float = 1.0

    def __post_init__(self) -> None:
        for setting, choices in (("diffusion", get_args(Form)), ("last_step", get_args(LastStep))):
            if getattr(self, setting) not in choices:
                raise ValueError(
                    f"sampler.{setting} is {getattr(self, setting)!r}, but {self.name} has {', '.join(choices)}; "
                    "choose one of them."
                )
        if self.steps < 2:
            raise ValueError(f"sampler.steps is {self.steps}, but {self.name} needs at least 2 steps; set it higher.")
        if not 0 <= self.norm < math.inf:
            raise ValueError(f"sampler.norm is {self.norm}, but a diffusion coefficient is at least 0; set it to 1.")

    def require(self, objective: Objective) -> None:
        """Raise ValueError for an objective without times in [0, 1], and where the equation is infinite at an end."""
        flow = require_times(objective, f"sampler {self.name}", instead="edm_heun")
        require_shift(self.shift, flow)
        low, high = flow.sampling_interval
        if self.last_step != "none" and not low < self.last_size < high:
            raise ValueError(
                f"sampler.last_size is {self.last_size}, but it must be between {low:g} and {high:g}, the times of the "
                "objective; SiT has 0.04."
            )
        if self.diffusion == "sbdm" and float(flow.coefficients(torch.tensor([high])).alpha) < 1e-6:
            raise ValueError(
                f"sampler.diffusion=sbdm is infinite at t = {high:g}, pure noise, where diffusion={flow.name} with "
                f"the prediction {flow.parameterization.name} starts; use sampler.diffusion=sigma, or weights that "
                "predict noise or score."
            )
        self._require_end(low)

    def _require_end(self, low: float) -> None:
        """Raise ValueError where the last time at which the score is needed is that of the data."""

    def _interval(self, objective: ContinuousObjective) -> tuple[float, float]:
        """Return the times between which there are equal steps with noise."""
        low, high = objective.sampling_interval
        return high, low if self.last_step == "none" else self.last_size

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        flow = require_times(objective, f"sampler {self.name}", instead="edm_heun")

        equation = Equation(denoiser, flow, condition, self.diffusion, self.norm)
        times = even_times(self._interval(flow), self.steps - (self.last_step != "none"), self.shift)
        x = noise(0)
        for draw, (t, next_t) in enumerate(pairwise(times), start=1):
            x = self._step(equation, x, t, next_t, noise(draw))
        if self.last_step == "none":
            return x
        return LAST_STEPS[self.last_step](equation.local(x, times[-1]), times[-1])

    def _step(self, equation: Equation, x: Tensor, t: float, next_t: float, noise: Tensor) -> Tensor:
        """Return x at ``next_t`` from x at ``t``."""
        raise NotImplementedError


@dataclass(frozen=True)
class EulerMaruyama(SdeSampler):
    """Euler and Maruyama's method: one call per step."""

    name: ClassVar[str] = "euler_maruyama"

    def calls(self) -> int:
        """Return the number of steps."""
        return self.steps

    def _step(self, equation: Equation, x: Tensor, t: float, next_t: float, noise: Tensor) -> Tensor:
        here, h = equation.local(x, t), t - next_t
        return x + h * here.drift + torch.sqrt(2 * h * here.diffusion) * noise


@dataclass(frozen=True)
class StochasticHeun(SdeSampler):
    """Heun's method after the step's noise is added, as SiT has it: two calls per step, one for the last.

    Its second call is at the end of a step, so the last step cannot be left out where the score there is infinite.
    """

    name: ClassVar[str] = "stochastic_heun"
    steps: int = 125

    def calls(self) -> int:
        """Return two calls per step, and one for a last step."""
        return 2 * self.steps - (self.last_step != "none")

    def _require_end(self, low: float) -> None:
        if self.last_step == "none" and low == 0:
            raise ValueError(
                "sampler.last_step=none makes stochastic_heun evaluate the score at t = 0, where it is infinite; use "
                "sampler.last_step=mean."
            )

    def _step(self, equation: Equation, x: Tensor, t: float, next_t: float, noise: Tensor) -> Tensor:
        """Return x after the noise and the mean of two drifts."""
        h = t - next_t
        moved = x + torch.sqrt(2 * h * equation.diffusion(x, t)) * noise
        first = equation.local(moved, t).drift
        second = equation.local(moved + h * first, next_t).drift
        return moved + h * (first + second) / 2
