"""Paths from data to noise: x_t = alpha(t) x_0 + sigma(t) noise for t in [0, 1], with their derivatives.

Time runs with the noise, as everywhere here: t = 0 is data, t = 1 noise. The released SiT program has 1 - t (Ma et al.
2024, arXiv 2401.08740, appendix B); its coefficients are these at the same x_t.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """The coefficients of x_t = alpha x_0 + sigma noise at t [B]: [B, 1, 1, 1] float32 each.

    The rates are the derivatives by t, and ``turn`` is alpha sigma_rate - alpha_rate sigma, which is positive. A
    process of whole steps has none of these three.
    """

    alpha: Tensor
    sigma: Tensor
    inverse_alpha: Tensor  # 1 / alpha
    sigma_by_alpha: Tensor  # sigma / alpha, the root of 1 / SNR
    alpha_rate: Tensor | None = None
    sigma_rate: Tensor | None = None
    turn: Tensor | None = None


class Path:
    """A path: alpha and sigma, their derivatives, and where it must not be evaluated."""

    name: ClassVar[str]
    reaches_noise: ClassVar[bool] = True  # alpha(1) = 0: no x_0 follows from a noise prediction there
    smooth_at_data: ClassVar[bool] = True  # False: sigma'(0) is infinite
    training_margin: ClassVar[float] = 1e-3  # of t at an end where it must not be evaluated; SiT's values
    sampling_margin: ClassVar[float] = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        """Return the coefficient of x_0 at times of any shape."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Return the coefficient of the noise."""
        raise NotImplementedError

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha by t."""
        raise NotImplementedError

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return the derivative of sigma by t."""
        raise NotImplementedError

    def turn(self, t: Tensor) -> Tensor:
        """Return alpha sigma' - alpha' sigma, in a form without rounding where there is one."""
        return self.alpha(t) * self.sigma_rate(t) - self.alpha_rate(t) * self.sigma(t)

    def at(self, t: Tensor) -> Coefficients:
        """Return all coefficients at t [B]."""
        t = t.view(-1, 1, 1, 1)
        alpha, sigma = self.alpha(t), self.sigma(t)
        rates = self.alpha_rate(t), self.sigma_rate(t), self.turn(t)
        return Coefficients(alpha, sigma, 1 / alpha, sigma / alpha, *rates)


class LinearPath(Path):
    """The straight line: alpha = 1 - t, sigma = t (Lipman et al. 2023; Liu et al. 2023, rectified flow)."""

    name = "linear"

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Return t."""
        return t

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return -1."""
        return -torch.ones_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)

    def turn(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)


class GVPPath(Path):
    """The generalized variance-preserving path: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Ma et al. 2024)."""

    name = "gvp"

    def alpha(self, t: Tensor) -> Tensor:
        """Return cos(pi t / 2)."""
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        """Return sin(pi t / 2)."""
        return torch.sin(t * (math.pi / 2))

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return -(pi / 2) sin(pi t / 2)."""
        return -(math.pi / 2) * self.sigma(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return (pi / 2) cos(pi t / 2)."""
        return (math.pi / 2) * self.alpha(t)

    def turn(self, t: Tensor) -> Tensor:
        """Return pi / 2."""
        return torch.full_like(t, math.pi / 2)


class VPPath(Path):
    """The variance-preserving diffusion with a linear beta(t) from ``beta_min`` to ``beta_max`` (Song et al. 2021).

    ln alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2, and sigma^2 = 1 - alpha^2. Its velocity is infinite at
    t = 0. Raises ValueError unless 0 < beta_min <= beta_max.
    """

    name = "vp"
    reaches_noise = False
    smooth_at_data = False
    training_margin = 1e-5

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(
                f"diffusion.path has beta_min {beta_min} and beta_max {beta_max}, but 0 < beta_min <= beta_max is "
                "needed; SiT uses 0.1 and 20."
            )
        self.beta_min, self.beta_max = beta_min, beta_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -(t**2) * ((self.beta_max - self.beta_min) / 4) - t * (self.beta_min / 2)

    def _log_alpha_rate(self, t: Tensor) -> Tensor:
        return -t * ((self.beta_max - self.beta_min) / 2) - self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        """Return exp(ln alpha)."""
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Return the root of 1 - alpha^2."""
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return alpha (ln alpha)'."""
        return self.alpha(t) * self._log_alpha_rate(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return -alpha alpha' / sigma, since alpha^2 + sigma^2 = 1."""
        return -self.alpha(t) * self.alpha_rate(t) / self.sigma(t)

    def turn(self, t: Tensor) -> Tensor:
        """Return -alpha' / sigma."""
        return -self.alpha_rate(t) / self.sigma(t)
