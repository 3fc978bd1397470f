"""Deterministic samplers of continuous objectives: they solve dx / dt = velocity from noise to data."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.objective import Objective
from diffusion.samplers import Noise, Sampler
from diffusion.time_grids import require_continuous, require_shift, require_times, start, times_of, velocity


@dataclass(frozen=True)
class OdeSampler:
    """The settings and refusals that samplers of fixed steps share.

    ``shift`` moves times toward the noise, as in training (`time_grids.shifted`). Raises ValueError for fewer than one
    step.
    """

    name: ClassVar[str]
    reads_device: ClassVar[bool] = False
    steps: int = 50
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps is {self.steps}, but {self.name} needs at least 1 step; set it higher.")

    def require(self, objective: Objective) -> None:
        """Raise ValueError for an objective without a velocity, or with noise levels that a shift does not fit."""
        require_shift(self.shift, require_continuous(objective, f"sampler {self.name}"))


@dataclass(frozen=True)
class Euler(OdeSampler):
    """Euler's method: one call per step, of equal steps in time or of Karras's noise levels."""

    name: ClassVar[str] = "euler"

    def calls(self) -> int:
        """Return the number of steps."""
        return self.steps

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        flow = require_continuous(objective, f"sampler {self.name}")
        times = times_of(flow, self.steps, self.shift)
        x = start(flow, noise(0))
        for t, next_t in pairwise(times):
            x = x + (next_t - t) * velocity(denoiser, flow, x, t, condition)
        return x


@dataclass(frozen=True)
class HeunOde(OdeSampler):
    """Heun's method, the trapezoid of an Euler step: of order two, with two calls per step.

    For noise levels there is `EdmHeun`, whose last step is another.
    """

    name: ClassVar[str] = "heun_ode"
    steps: int = 25

    def require(self, objective: Objective) -> None:
        """Raise ValueError for an objective without times in [0, 1]."""
        require_shift(self.shift, require_times(objective, f"sampler {self.name}", instead="edm_heun"))

    def calls(self) -> int:
        """Return two calls per step."""
        return 2 * self.steps

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]."""
        flow = require_times(objective, f"sampler {self.name}", instead="edm_heun")
        times, x = times_of(flow, self.steps, self.shift), noise(0)
        for t, next_t in pairwise(times):
            first = velocity(denoiser, flow, x, t, condition)
            second = velocity(denoiser, flow, x + (next_t - t) * first, next_t, condition)
            x = x + (next_t - t) * (first + second) / 2
        return x


@dataclass(frozen=True)
class Dopri5:
    """Dormand and Prince's method of order five (torchdiffeq), whose steps follow from the tolerances.

    It reads an error from the device at each step, and all images of a batch share their steps: within the tolerance,
    an image depends on those that it is sampled with. The defaults are SiT's. Raises ValueError for tolerances that are
    not positive.
    """

    name: ClassVar[str] = "dopri5"
    reads_device: ClassVar[bool] = True
    atol: float = 1e-6
    rtol: float = 1e-3
    counted: list[int] = field(default_factory=list, init=False, repr=False, compare=False)  # calls of each batch

    def __post_init__(self) -> None:
        for name in ("atol", "rtol"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"sampler.{name} is {getattr(self, name)}, but a tolerance is between 0 and 1; SiT has 1e-6 "
                    "and 1e-3."
                )

    def require(self, objective: Objective) -> None:
        """Raise ValueError for an objective without times in [0, 1]."""
        require_times(objective, f"sampler {self.name}", instead="edm_heun")

    def calls(self) -> int | None:
        """Return the mean number of calls of the batches so far, or None before the first."""
        return round(sum(self.counted) / len(self.counted)) if self.counted else None

    def __call__(self, denoiser: Denoiser, objective: Objective, noise: Noise, condition: Condition) -> Tensor:
        """Return samples [B, c, h, w]. Raises ValueError under XLA."""
        from torchdiffeq import odeint  # imported late: it loads scipy

        flow, x = require_times(objective, f"sampler {self.name}", instead="edm_heun"), noise(0)
        require_readable(self, x.device)
        calls = 0

        def rate(t: Tensor, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return velocity(denoiser, flow, x, float(t), condition)

        low, high = flow.sampling_interval
        ends = torch.tensor([high, low], dtype=torch.float64, device=x.device)
        at_end = {"step_t": ends[1:]}  # else its last step goes beyond the data, where a path may not be defined
        found: Tensor = odeint(rate, x, ends, method=self.name, atol=self.atol, rtol=self.rtol, options=at_end)[-1]
        self.counted.append(calls)
        return found


def require_readable(sampler: Sampler, device: torch.device) -> None:
    """Raise ValueError where a sampler reads from the device and runs under XLA, which compiles a fixed program."""
    if sampler.reads_device and device.type == "xla":
        raise ValueError(
            f"sampler {sampler.name} chooses its steps by reading from the device, but runtime=xla runs a program of "
            "fixed steps; use diffusion/sampler=heun_ode."
        )
