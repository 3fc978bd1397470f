"""The quantity that a network predicts: p x_0 + q noise, with p and q that depend on the coefficients of x_t.

Since x_t is another mixture of the same two, each prediction at a known x_t determines x_0 and noise, and so all other
quantities. A new prediction needs a class and a YAML in ``conf/diffusion/prediction``.
"""

from typing import ClassVar

import torch
from torch import Tensor

from diffusion.paths import Coefficients

Mixture = tuple[Tensor, Tensor]  # p and q, which broadcast to [B, c, h, w]


class Parameterization:
    """The quantity that a network's output [B, c, h, w] estimates."""

    name: ClassVar[str]  # the option of ``diffusion/prediction=``
    needs_rates: ClassVar[bool] = False  # whether it is defined by the path's derivatives
    is_rate: ClassVar[bool] = False  # whether it changes its sign where time runs the other way

    def mixture(self, c: Coefficients) -> Mixture:
        """Return p and q of the target p x_0 + q noise."""
        raise NotImplementedError

    def scaled(self, output: Tensor, c: Coefficients) -> Tensor:
        """Return the output in the unit in which its error is measured: that of `mixture`."""
        return output

    def target(self, x_0: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """Return the value that a scaled output should have, [B, c, h, w]."""
        p, q = self.mixture(c)
        return p * x_0 + q * noise

    def determinant(self, c: Coefficients) -> Tensor:
        """Return alpha q - sigma p: an error e of the scaled output is one of -sigma e / determinant in x_0."""
        p, q = self.mixture(c)
        return c.alpha * q - c.sigma * p

    def ends(self, output: Tensor, x_t: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        """Return the x_0 and the noise that an output at x_t implies, [B, c, h, w] each."""
        (p, q), determinant = self.mixture(c), self.determinant(c)
        scaled = self.scaled(output, c)
        return (q * x_t - c.sigma * scaled) / determinant, (c.alpha * scaled - p * x_t) / determinant

    def velocity(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Return dx_t / dt that an output at x_t implies, [B, c, h, w]."""
        assert c.alpha_rate is not None
        assert c.sigma_rate is not None
        x_0, noise = self.ends(output, x_t, c)
        return c.alpha_rate * x_0 + c.sigma_rate * noise


class PredictNoise(Parameterization):
    """The noise (Ho et al. 2020)."""

    name = "noise"

    def mixture(self, c: Coefficients) -> Mixture:
        """Return 0 and 1."""
        return torch.zeros_like(c.alpha), torch.ones_like(c.alpha)

    def target(self, x_0: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """Return the noise."""
        return noise

    def determinant(self, c: Coefficients) -> Tensor:
        """Return alpha."""
        return c.alpha

    def ends(self, output: Tensor, x_t: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        """Return (x_t - sigma noise) / alpha and the noise."""
        noise = self.scaled(output, c)
        return c.inverse_alpha * x_t - c.sigma_by_alpha * noise, noise


class PredictScore(PredictNoise):
    """The score -noise / sigma of the density of x_t. Its error is measured in the noise, as SiT does."""

    name = "score"

    def scaled(self, output: Tensor, c: Coefficients) -> Tensor:
        """Return the noise that the score implies."""
        return -c.sigma * output


class PredictX0(Parameterization):
    """The data x_0."""

    name = "x_0"

    def mixture(self, c: Coefficients) -> Mixture:
        """Return 1 and 0."""
        return torch.ones_like(c.alpha), torch.zeros_like(c.alpha)

    def target(self, x_0: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """Return x_0."""
        return x_0

    def determinant(self, c: Coefficients) -> Tensor:
        """Return -sigma."""
        return -c.sigma

    def ends(self, output: Tensor, x_t: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        """Return x_0 and (x_t - alpha x_0) / sigma."""
        return output, (x_t - c.alpha * output) / c.sigma


class PredictV(Parameterization):
    """v = alpha noise - sigma x_0 (Salimans & Ho 2022)."""

    name = "v"

    def mixture(self, c: Coefficients) -> Mixture:
        """Return -sigma and alpha."""
        return -c.sigma, c.alpha


class PredictVelocity(Parameterization):
    """The velocity dx_t / dt = alpha' x_0 + sigma' noise along the path (Lipman et al. 2023)."""

    name = "velocity"
    needs_rates = True
    is_rate = True

    def mixture(self, c: Coefficients) -> Mixture:
        """Return alpha' and sigma'."""
        assert c.alpha_rate is not None
        assert c.sigma_rate is not None
        return c.alpha_rate, c.sigma_rate

    def determinant(self, c: Coefficients) -> Tensor:
        """Return alpha sigma' - alpha' sigma."""
        assert c.turn is not None
        return c.turn

    def velocity(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Return the output."""
        return output
