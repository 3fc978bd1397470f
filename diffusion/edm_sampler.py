"""The stochastic sampler of EDM (Karras et al. 2022, algorithm 2; arXiv 2206.00364)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.continuous import ContinuousObjective
from diffusion.objective import Objective
from diffusion.samplers import Noise
from diffusion.time_grids import noise_levels, start, velocity

_MOST_CHURN = math.sqrt(2) - 1  # of the noise level, in one step


@dataclass(frozen=True)
class EdmHeun:
    """Heun's method between noise levels, with two calls per step except the last, after some noise is added.

    A step raises the level sigma, where it is in [``churn_min``, ``churn_max``], by ``churn`` / ``steps`` of itself;
    the added noise is ``churn_noise`` times standard normal. Without ``churn`` nothing is random. Levels are spaced by
    ``rho`` over the objective's (equation 5), and 0 is the last.

    Raises ValueError for fewer than two steps, a negative churn, or a rho that is not positive.
    """

    name: ClassVar[str] = "edm_heun"
    reads_device: ClassVar[bool] = False
    steps: int = 18
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float | None = None  # null: no limit
    churn_noise: float = 1.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"sampler.steps is {self.steps}, but {self.name} needs at least 2 steps; set it higher.")
        for name in ("churn", "churn_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"sampler.{name} is {getattr(self, name)}, but it must be at least 0; set it higher.")
        if not 0 < self.rho < math.inf:
            raise ValueError(f"sampler.rho is {self.rho}, but it must be above 0; EDM has 7.")
        if self.churn_max is not None and self.churn_max < self.churn_min:
            raise ValueError(
                f"sampler.churn_max {self.churn_max} is below sampler.churn_min {self.churn_min}; no step would "
                "add noise."
            )

    def require(self, objective: Objective) -> None:
        """Raise ValueError for an objective without noise levels."""
        _require_levels(objective)

    def calls(self) -> int:
        """Return two calls per step, and one for the last."""
        return 2 * self.steps - 1

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        edm = _require_levels(objective)
        levels = noise_levels(*edm.sampling_interval, self.steps, self.rho)
        x = start(edm, noise(0))
        for draw, (level, next_level) in enumerate(pairwise(levels), start=1):
            raised = level * (1 + self._raise_at(level))
            if raised > level:
                x = x + math.sqrt(raised**2 - level**2) * self.churn_noise * noise(draw)
            slope = velocity(denoiser, edm, x, raised, condition)
            tried = x + (next_level - raised) * slope
            if next_level > 0:
                slope = (slope + velocity(denoiser, edm, tried, next_level, condition)) / 2
            x = x + (next_level - raised) * slope
        return x

    def _raise_at(self, level: float) -> float:
        """Return the fraction by which a noise level is raised, gamma in algorithm 2."""
        is_inside = self.churn_min <= level and (self.churn_max is None or level <= self.churn_max)
        return min(self.churn / self.steps, _MOST_CHURN) if is_inside else 0.0


def _require_levels(objective: Objective) -> ContinuousObjective:
    if not isinstance(objective, ContinuousObjective) or not objective.has_levels:
        instead = "heun_ode" if isinstance(objective, ContinuousObjective) else "ddpm"
        raise ValueError(
            f"sampler edm_heun needs an objective with noise levels, such as diffusion=edm, but the objective is "
            f"diffusion={objective.name}; use diffusion/sampler={instead}."
        )
    return objective
