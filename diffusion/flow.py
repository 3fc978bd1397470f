"""Flow matching on a path from data to noise (Lipman et al. 2023; Liu et al. 2023; Ma et al. 2024, SiT)."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from core.batch import Batch
from core.draws import Times
from diffusion.continuous import ContinuousObjective
from diffusion.objective import LOSS, LatentFacts, mean_per_sample, named
from diffusion.paths import Coefficients, LinearPath, Path
from diffusion.predictions import Parameterization, PredictVelocity
from diffusion.times import MovedTimes, UniformTimes, draws_levels
from diffusion.weightings import Unweighted, Weighting

_LINEAR, _VELOCITY, _UNWEIGHTED, _UNIFORM = LinearPath(), PredictVelocity(), Unweighted(), UniformTimes()
_LEAST_NORM = 0.01  # of a velocity in units of the true one's, for the direction term
_BASE_DIMENSION = 4096  # of a latent of 32x32x4, for which the shift by resolution is 1


class Flow(ContinuousObjective):
    """x_t = alpha(t) x_0 + sigma(t) noise on a ``path`` for t in [0, 1]; the network sees t unscaled.

    The loss is the mean squared error of the ``prediction``, times ``weighting``. ``shift`` moves times toward the
    noise: t' = shift t / (1 + (shift - 1) t) (Esser et al. 2024); "resolution" is the root of the latent's dimension
    over 4096 (Zheng et al. 2025, RAE). With ``direction_weight`` w > 0 the loss has the term w (1 - cosine) of
    velocities, over the channels (Yao et al. 2025, LightningDiT).

    Two settings are for networks of the released SiT program: with ``reversed_time`` the network sees 1 - t, and its
    velocity is that by 1 - t; with ``outputs_per_channel`` 2, the second half of its output is not read.
    """

    name = "flow"

    def __init__(
        self,
        path: Path = _LINEAR,
        prediction: Parameterization = _VELOCITY,
        weighting: Weighting = _UNWEIGHTED,
        times: Times = _UNIFORM,
        shift: float | Literal["resolution"] = 1.0,
        direction_weight: float = 0.0,
        reversed_time: bool = False,
        outputs_per_channel: Literal[1, 2] = 1,
    ) -> None:
        super().__init__()
        if isinstance(shift, str):
            raise ValueError(
                f"diffusion.shift is {shift!r}, but there are no shards whose latents it could follow; give a number."
            )
        if draws_levels(times):
            raise ValueError(
                "diffusion=flow needs times between 0 and 1, but diffusion/times=log_normal draws noise levels, for "
                "diffusion=edm; use diffusion/times=logit_normal."
            )
        if not 0 <= direction_weight < math.inf:
            raise ValueError(
                f"diffusion.direction_weight is {direction_weight}, but it must be at least 0; LightningDiT has 1."
            )
        self.path, self.parameterization, self.weighting = path, prediction, weighting
        self.direction_weight, self.reversed_time = direction_weight, reversed_time
        self.outputs_per_channel = outputs_per_channel
        self.training_interval = self._interval(path.training_margin, weighting.is_bounded)
        self.sampling_interval = self._interval(path.sampling_margin)
        self.shift, self._drawn = shift, times
        self.times = MovedTimes.of(times, shift, *self.training_interval)

    def _interval(self, margin: float, is_bounded: bool = True) -> tuple[float, float]:
        """Return the least and the greatest t, ``margin`` from an end where a network's output implies no velocity."""
        inside = is_bounded and self.parameterization.is_rate
        from_data = not self.path.smooth_at_data or (self.path.reaches_noise and not inside)
        from_noise = self.path.reaches_noise and not inside
        return margin if from_data else 0.0, 1 - margin if from_noise else 1.0

    @classmethod
    def settled(cls, settings: Mapping[str, Any], latents: LatentFacts) -> dict[str, Any]:
        """Return the settings with a ``shift`` by resolution as a number."""
        settings = dict(settings)
        if settings.get("shift") == "resolution":
            settings["shift"] = math.sqrt(latents.dimension / _BASE_DIMENSION)
        return settings

    def facts(self) -> dict[str, str | float]:
        """Return the names of the parts, and the settings of the loss."""
        names = {"path": named(self.path), "prediction": named(self.parameterization)}
        names |= {"weighting": named(self.weighting), "times": named(self._drawn)}
        return {"name": self.name, **names, "shift": self.shift, "direction_weight": self.direction_weight}

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the path's coefficients at t [B]."""
        return self.path.at(t)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of t [B]: [B, 1, 1, 1] each."""
        t = t.view(-1, 1, 1, 1)
        return self.path.alpha(t), self.path.sigma(t)

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t, and t or 1 - t."""
        return x_t, 1 - t if self.reversed_time else t

    def from_inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t, and t or 1 - t."""
        return self.inputs(x_t, t)

    def read(self, output: Tensor, x_t: Tensor) -> Tensor:
        """Return the first half of two, as a rate by t."""
        read = output[:, : x_t.shape[1]].float()
        return -read if self.reversed_time and self.parameterization.is_rate else read

    def losses(self, output: Tensor, batch: Batch, x_t: Tensor) -> dict[str, Tensor]:
        """Return the loss [B], and with a ``direction_weight`` also its terms ``mse`` and ``direction``."""
        output, coefficients = self.read(output, x_t), self.coefficients(batch.t)
        target = self.parameterization.target(batch.x_0, batch.noise, coefficients)
        errors = mean_per_sample((target - self.parameterization.scaled(output, coefficients)) ** 2)
        loss = self.weighting.weigh(errors, self.parameterization, coefficients)
        if not self.direction_weight:
            return {LOSS: loss}
        found = self.parameterization.velocity(output, x_t, coefficients)
        true = _VELOCITY.target(batch.x_0, batch.noise, coefficients)
        direction = mean_per_sample(1 - _cosine(found, true))
        return {LOSS: loss + self.direction_weight * direction, "mse": loss, "direction": direction}

    def level(self, t: Tensor) -> Tensor:
        """Return t."""
        return t


def _cosine(found: Tensor, true: Tensor) -> Tensor:
    """Return the cosine over the channels of two velocities [B, c, h, w]: [B, h, w].

    The found one's norm counts as at least a part of the true one's. A network begins with an output of 0, where the
    gradient of the cosine is infinite: one such step would spoil Adam's second moments for thousands of steps.
    """
    length = torch.linalg.vector_norm(true, dim=1).clamp(min=1e-8)
    norm = torch.maximum(torch.linalg.vector_norm(found, dim=1), _LEAST_NORM * length)
    return (found * true).sum(dim=1) / (norm * length)
