"""EDM: a denoiser whose inputs and outputs have unit variance at every noise level (Karras et al. 2022).

Equation numbers are those of arXiv 2206.00364.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from core.batch import Batch
from core.draws import Times
from diffusion.continuous import ContinuousObjective
from diffusion.objective import LOSS, LatentFacts, mean_per_sample, named
from diffusion.paths import Coefficients
from diffusion.predictions import Mixture, Parameterization
from diffusion.times import LogNormalLevels, draws_levels

_LEVELS = LogNormalLevels()


class PredictScaledResidual(Parameterization):
    """F = (x_0 - c_skip x) / c_out of equation 7, a mixture of x_0 and noise with unit variance (appendix B.6)."""

    name = "edm"

    def __init__(self, sigma_data: float) -> None:
        self.sigma_data = sigma_data

    def total(self, c: Coefficients) -> Tensor:
        """Return the standard deviation of x, sqrt(sigma^2 + sigma_data^2)."""
        return torch.sqrt(c.sigma**2 + self.sigma_data**2)

    def c_skip(self, c: Coefficients) -> Tensor:
        """Return sigma_data^2 / (sigma^2 + sigma_data^2)."""
        return self.sigma_data**2 / self.total(c) ** 2

    def c_out(self, c: Coefficients) -> Tensor:
        """Return sigma sigma_data / sqrt(sigma^2 + sigma_data^2)."""
        return c.sigma * self.sigma_data / self.total(c)

    def mixture(self, c: Coefficients) -> Mixture:
        """Return p and q of F = p x_0 + q noise."""
        return c.sigma / (self.sigma_data * self.total(c)), -self.sigma_data / self.total(c)

    def determinant(self, c: Coefficients) -> Tensor:
        """Return q - sigma p."""
        return -self.total(c) / self.sigma_data


class EDM(ContinuousObjective):
    """x_t = x_0 + t noise, where t is the noise level sigma; the network estimates F of equation 7.

    The published weight (equation 8 and table 1) times c_out^2 is 1, so the loss is F's mean squared error. The network
    sees c_in x_t and c_noise = ln(sigma) / 4. ``sigma_data`` is the standard deviation of the latents; null takes it
    from the statistics of the shards, and ``sigma_data_from`` records that.

    Raises ValueError where ``sigma_data`` is missing or not positive, or for times that are not noise levels.
    """

    name = "edm"
    has_levels = True
    parameterization: PredictScaledResidual

    def __init__(
        self,
        sigma_data: float | None = None,
        times: Times = _LEVELS,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data_from: Literal["config", "shards"] = "config",
    ) -> None:
        super().__init__()
        if sigma_data is None:
            raise ValueError(
                "diffusion.sigma_data is missing, and there are no shards whose statistics give it; set it to the "
                "standard deviation of the latents that the network was trained on (0.5 in EDM)."
            )
        if not 0 < sigma_data < math.inf:
            raise ValueError(
                f"diffusion.sigma_data is {sigma_data} (from: {sigma_data_from}), but a standard deviation must be "
                "above 0; EDM has 0.5."
            )
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"diffusion.sigma_min is {sigma_min} and diffusion.sigma_max is {sigma_max}, but EDM needs "
                "0 < sigma_min < sigma_max; its paper uses 0.002 and 80."
            )
        if not draws_levels(times):
            raise ValueError(
                f"diffusion=edm trains on noise levels, but diffusion.times is a {type(times).__name__}, which draws "
                "times between 0 and 1; use diffusion/times=log_normal."
            )
        self.times = times
        self.outputs_per_channel = 1
        self.sigma_data, self.sigma_data_from = sigma_data, sigma_data_from
        self.sampling_interval = sigma_min, sigma_max
        self.parameterization = PredictScaledResidual(sigma_data)

    @classmethod
    def settled(cls, settings: Mapping[str, Any], latents: LatentFacts) -> dict[str, Any]:
        """Return the settings with ``sigma_data``, where it is null, from the latents' statistics."""
        if settings.get("sigma_data") is not None:
            return {"sigma_data_from": "config", **settings}
        return {**settings, "sigma_data": latents.std, "sigma_data_from": "shards"}

    def facts(self) -> dict[str, str | float]:
        """Return the name, the times, and ``sigma_data`` with its origin."""
        data = {"sigma_data": self.sigma_data, "sigma_data_from": self.sigma_data_from}
        return {"name": self.name, "times": named(self.times), **data}

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return 1 and sigma, and their derivatives 0 and 1, for sigma [B]."""
        sigma = t.view(-1, 1, 1, 1)
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        return Coefficients(one, sigma, one, sigma, zero, one, one)

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_in x_t and c_noise (table 1)."""
        return x_t / self.parameterization.total(self.coefficients(t)), torch.log(t) / 4

    def from_inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t / c_in and exp(4 c_noise)."""
        sigma = torch.exp(4 * t)
        return x_t * self.parameterization.total(self.coefficients(sigma)), sigma

    def losses(self, output: Tensor, batch: Batch, x_t: Tensor) -> dict[str, Tensor]:
        """Return the mean squared error of F, [B] (equation 8)."""
        target = self.parameterization.target(batch.x_0, batch.noise, self.coefficients(batch.t))
        return {LOSS: mean_per_sample((target - self.read(output, x_t)) ** 2)}

    def level(self, t: Tensor) -> Tensor:
        """Return sigma / (sigma + sigma_data)."""
        return t / (t + self.sigma_data)
