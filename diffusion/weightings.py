"""Weights of the squared error at each noise level.

Each is defined for one quantity, and converted to the one that the network predicts: at a given x_t, an error e of the
output is one of -sigma e / determinant in x_0. So a weighting gives the same loss for the same prediction, whatever
the network's output is. A new one needs a class and a YAML in ``conf/diffusion/weighting``.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from diffusion.paths import Coefficients
from diffusion.predictions import Parameterization


class Weighting:
    """Weighs the errors of samples by their noise level."""

    name: ClassVar[str]  # the option of ``diffusion/weighting=``
    needs_rates: ClassVar[bool] = False  # whether it is defined by the path's derivatives
    is_bounded: ClassVar[bool] = True  # False: it is infinite at an end of the path

    def weigh(self, errors: Tensor, parameterization: Parameterization, c: Coefficients) -> Tensor:
        """Return weighted mean squared errors [B] of outputs with errors [B]."""
        raise NotImplementedError


class Unweighted(Weighting):
    """Weighs all noise levels alike, in the unit of the prediction."""

    name = "none"

    def weigh(self, errors: Tensor, parameterization: Parameterization, c: Coefficients) -> Tensor:
        """Return the errors."""
        return errors


class MinSNR(Weighting):
    """The x_0 error times min(SNR, gamma), where SNR = alpha^2 / sigma^2 (Hang et al. 2023).

    For a noise prediction this is min(SNR, gamma) / SNR, for v with alpha^2 + sigma^2 = 1 it is
    min(SNR, gamma) / (SNR + 1). Raises ValueError unless gamma is positive.
    """

    name = "min_snr"

    def __init__(self, gamma: float = 5.0) -> None:
        if not 0 < gamma < math.inf:
            raise ValueError(
                f"diffusion.weighting.gamma is {gamma}, but min-SNR needs a finite number above 0; its paper uses 5."
            )
        self.gamma = gamma

    def weigh(self, errors: Tensor, parameterization: Parameterization, c: Coefficients) -> Tensor:
        """Return min(alpha^2, gamma sigma^2) / determinant^2 times the errors."""
        least = torch.minimum(c.alpha**2, self.gamma * c.sigma**2)
        return errors * (least / parameterization.determinant(c) ** 2).flatten()


class OfVelocity(Weighting):
    """The error of the velocity that the output implies (Ma et al. 2024, section 2.4; SiT's "velocity")."""

    name = "velocity"
    needs_rates = True
    is_bounded = False

    def weigh(self, errors: Tensor, parameterization: Parameterization, c: Coefficients) -> Tensor:
        """Return (turn / determinant)^2 times the errors."""
        assert c.turn is not None
        return errors * ((c.turn / parameterization.determinant(c)) ** 2).flatten()


class OfLikelihood(Weighting):
    """The weight whose loss bounds the likelihood under the SDE with D = sigma turn / alpha (SiT's "likelihood").

    For a noise prediction it is turn / (alpha sigma).
    """

    name = "likelihood"
    needs_rates = True
    is_bounded = False

    def weigh(self, errors: Tensor, parameterization: Parameterization, c: Coefficients) -> Tensor:
        """Return turn alpha / (sigma determinant^2) times the errors."""
        assert c.turn is not None
        return errors * (c.turn * c.alpha / (c.sigma * parameterization.determinant(c) ** 2)).flatten()
