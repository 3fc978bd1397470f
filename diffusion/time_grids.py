"""The times that a sampler of a continuous objective visits, from noise to data, and the noise that it starts from."""

import math

import torch
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.continuous import ContinuousObjective
from diffusion.objective import Objective

Interval = tuple[float, float]  # from the time at which a sampler starts to the one at which it ends
_RHO = 7.0  # of the noise levels of Karras et al. 2022


def require_continuous(objective: Objective, who: str) -> ContinuousObjective:
    """Return the objective. Raises ValueError where it has whole steps, at which there is no velocity."""
    if not isinstance(objective, ContinuousObjective):
        raise ValueError(
            f"{who} needs an objective with a velocity, such as diffusion=flow, but the objective is "
            f"diffusion={objective.name}; use diffusion/sampler=ddpm."
        )
    return objective


def require_times(objective: Objective, who: str, instead: str) -> ContinuousObjective:
    """Return the objective. Raises ValueError, naming the sampler ``instead``, where its t is not a time in [0, 1]."""
    found = require_continuous(objective, who)
    if found.has_levels:
        raise ValueError(
            f"{who} needs an objective with times between 0 and 1, such as diffusion=flow, but the objective is "
            f"diffusion={objective.name}, whose t is the noise level; use diffusion/sampler={instead}."
        )
    return found


def require_shift(shift: float, objective: ContinuousObjective) -> None:
    """Raise ValueError for a shift of times that is not positive, or of an objective with noise levels."""
    if not 0 < shift < math.inf:
        raise ValueError(f"sampler.shift is {shift}, but it must be above 0; 1 leaves times as they are.")
    if objective.has_levels and shift != 1:
        raise ValueError(
            f"sampler.shift is {shift}, but diffusion={objective.name} has noise levels, not times; leave it out."
        )


def shifted(t: float, shift: float) -> float:
    """Return t' = shift t / (1 + (shift - 1) t), which keeps 0 and 1; a shift above 1 moves times toward the noise."""
    return shift * t / (1 + (shift - 1) * t)


def even_times(interval: Interval, steps: int, shift: float = 1.0) -> list[float]:
    """Return ``steps`` + 1 times that divide an interval evenly before they are shifted, both ends included.

    The ends stay where they are: times are shifted as fractions of the interval.
    """
    first, last = interval
    return [last + (first - last) * shifted((steps - step) / steps, shift) for step in range(steps + 1)]


def noise_levels(lowest: float, highest: float, steps: int, rho: float = _RHO) -> list[float]:
    """Return ``steps`` descending noise levels and 0 (Karras et al. 2022, equation 5)."""
    low, high = lowest ** (1 / rho), highest ** (1 / rho)
    fractions = [step / max(steps - 1, 1) for step in range(steps)]
    return [*((high + fraction * (low - high)) ** rho for fraction in fractions), 0.0]


def times_of(objective: ContinuousObjective, steps: int, shift: float = 1.0) -> list[float]:
    """Return the ``steps`` + 1 times of a deterministic sampler. Noise levels are Karras's, and their last is 0."""
    low, high = objective.sampling_interval
    return noise_levels(low, high, steps) if objective.has_levels else even_times((high, low), steps, shift)


def start(objective: ContinuousObjective, noise: Tensor) -> Tensor:
    """Return x_t [B, c, h, w] at the largest time: the noise, at its level where the objective has levels."""
    return noise * objective.sampling_interval[1] if objective.has_levels else noise


def at(x: Tensor, t: float) -> Tensor:
    """Return a time as the t of every row of x: [B] float32."""
    return torch.full((len(x),), t, device=x.device)


def velocity(denoiser: Denoiser, objective: ContinuousObjective, x: Tensor, t: float, condition: Condition) -> Tensor:
    """Call the network and return dx / dt at x [B, c, h, w]."""
    rows = at(x, t)
    return objective.velocity(denoiser(*objective.inputs(x, rows), condition), x, rows)
