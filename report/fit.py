"""Fit a power law to points, and measure how well it holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PowerLaw:
    """A power law y = 10^intercept x^slope, fitted by least squares in log10 x and log10 y."""

    slope: float
    intercept: float
    correlation: float  # Pearson's, of log x and log y
    semilog_correlation: float  # Pearson's, of log x and y; -0.93 in the paper (figure 8)
    rank_correlation: float  # Spearman's
    count: int
    residual_std: float  # of log10 y, with n - 2 degrees of freedom
    mean_log_x: float
    spread_log_x: float  # sum of squared deviations of log10 x

    def at(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the fitted line at each of ``x``, in an array of its shape."""
        return np.asarray(10 ** (self.intercept + self.slope * np.log10(x)))

    def band(self, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the lower and upper end at each of ``x`` of the line's 95% confidence band.

        The band is for the line itself, not for new points. It uses Student's t with n - 2 degrees of freedom, assumes
        independent deviations of equal variance, and does not include the noise between seeds.
        """
        away = (np.log10(x) - self.mean_log_x) ** 2 / self.spread_log_x
        half = self._quantile() * self.residual_std * np.sqrt(1 / self.count + away)
        return self.at(x) / 10**half, self.at(x) * 10**half

    @property
    def slope_interval(self) -> tuple[float, float]:
        """Return the 95% confidence interval of the slope."""
        half = self._quantile() * self.residual_std / self.spread_log_x**0.5
        return self.slope - half, self.slope + half

    def _quantile(self) -> float:
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.count - 2))


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Return the fit, or None for fewer than 3 points, for a single x, and where a value is not positive."""
    if len(x) < 3 or len(set(x)) < 2 or min(*x, *y) <= 0:
        return None
    log_x, log_y = np.log10(x), np.log10(y)
    line = stats.linregress(log_x, log_y)
    residuals = log_y - (line.intercept + line.slope * log_x)
    return PowerLaw(
        slope=float(line.slope),
        intercept=float(line.intercept),
        correlation=float(line.rvalue),
        semilog_correlation=float(np.corrcoef(log_x, y)[0, 1]),
        rank_correlation=float(stats.spearmanr(x, y).statistic),
        count=len(x),
        residual_std=float(np.sqrt((residuals**2).sum() / (len(x) - 2))),
        mean_log_x=float(log_x.mean()),
        spread_log_x=float(((log_x - log_x.mean()) ** 2).sum()),
    )
