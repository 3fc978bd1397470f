"""Objectives in continuous time, which have a velocity and a score at every t."""

import math
from typing import ClassVar

from torch import Tensor

from diffusion.objective import Objective, Prediction
from diffusion.paths import Coefficients
from diffusion.predictions import Parameterization


class ContinuousObjective(Objective):
    """An objective with x_t = alpha(t) x_0 + sigma(t) noise for every t of an interval.

    Samples follow dx / dt = velocity from t = ``sampling_interval[1]``, where x_t is sigma noise, down to
    ``sampling_interval[0]``.
    """

    parameterization: Parameterization  # what the network predicts
    sampling_interval: tuple[float, float]  # the least and the greatest t at which a sampler evaluates the network
    has_levels: ClassVar[bool] = False  # whether t is the noise level sigma itself, not a time in [0, 1]

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of x_t at t [B], with their derivatives by t: [B, 1, 1, 1] each."""
        raise NotImplementedError

    def time_range(self) -> tuple[float, float]:
        """Return 0 and 1, or all noise levels."""
        return 0.0, math.inf if self.has_levels else 1.0

    def read(self, output: Tensor, x_t: Tensor) -> Tensor:
        """Return what ``parameterization`` interprets in a network's output at x_t: [B, c, h, w] float32."""
        return output.float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of t [B]: [B, 1, 1, 1] each."""
        coefficients = self.coefficients(t)
        return coefficients.alpha, coefficients.sigma

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Return the x_0 and the noise that the output implies; there is no variance."""
        ends = self.parameterization.ends(self.read(output, x_t), x_t, self.coefficients(t))
        return Prediction(*ends, None)

    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return dx_t / dt that the network's output implies: [B, c, h, w] float32."""
        return self.parameterization.velocity(self.read(output, x_t), x_t, self.coefficients(t))

    def score(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the gradient by x_t of the log-density of x_t, -noise / sigma: [B, c, h, w] float32."""
        coefficients = self.coefficients(t)
        _, noise = self.parameterization.ends(self.read(output, x_t), x_t, coefficients)
        return -noise / coefficients.sigma
