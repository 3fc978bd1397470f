"""Fit a power law to models, and measure how well it fits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from report.seeds import geometric_mean

CONFIDENCE = 0.95
_RESAMPLES = 2000  # of a bootstrap


@dataclass(frozen=True)
class PowerLaw:
    """The power law y = 10^intercept x^slope, by least squares in log10 x and log10 y."""

    slope: float
    intercept: float
    correlation: float  # Pearson's, of log x and log y
    semilog_correlation: float  # Pearson's, of log x and y: the paper's -0.93 (figure 8)
    rank_correlation: float  # Spearman's
    rank_interval: tuple[float, float] | None  # of it, over seeds; None without several
    count: int  # of models
    residual_std: float  # of log10 y, with n - 2 degrees of freedom
    mean_log_x: float
    spread_log_x: float  # sum of squared deviations of log10 x

    def at(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the line at each x, [len(x)]."""
        return np.asarray(10 ** (self.intercept + self.slope * np.log10(x)))

    def band(self, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return lower and upper end, [len(x)] each, of the 95% confidence band of the line, not of new points.

        Uses Student's t with n - 2 degrees of freedom. It assumes independent deviations of equal variance, and does
        not include the noise between seeds.
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


def fit_power_law(x: Sequence[float], values: Sequence[Sequence[float]]) -> PowerLaw | None:
    """Return the fit through models at x, whose y are the geometric means of their seeds' values.

    Returns None for fewer than 3 models, for models with one x, or if a value is not above 0.
    """
    if len(x) < 3 or len(set(x)) < 2 or min(*x, *(value for of_model in values for value in of_model)) <= 0:
        return None
    y = [geometric_mean(of_model) for of_model in values]
    log_x, log_y = np.log10(x), np.log10(y)
    line = stats.linregress(log_x, log_y)
    residuals = log_y - (line.intercept + line.slope * log_x)
    return PowerLaw(
        slope=float(line.slope),
        intercept=float(line.intercept),
        correlation=float(line.rvalue),
        semilog_correlation=float(np.corrcoef(log_x, y)[0, 1]),
        rank_correlation=float(stats.spearmanr(x, y).statistic),
        rank_interval=rank_interval(x, values),
        count=len(x),
        residual_std=float(np.sqrt((residuals**2).sum() / (len(x) - 2))),
        mean_log_x=float(log_x.mean()),
        spread_log_x=float(((log_x - log_x.mean()) ** 2).sum()),
    )


def rank_interval(x: Sequence[float], values: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return the 95% bootstrap interval over seeds of Spearman's correlation of x and the models' geometric means.

    Each of 2,000 resamples, always the same ones, draws as many of a model's seeds as it has, with replacement (Efron
    1979, percentiles). Returns None where no model has several seeds, or all means are equal.
    """
    if all(len(of_model) == 1 for of_model in values):
        return None
    generator = np.random.Generator(np.random.Philox(0))
    logs = [np.log(of_model) for of_model in values]
    means = [log[generator.integers(len(log), size=(_RESAMPLES, len(log)))].mean(axis=1) for log in logs]
    ranks = stats.rankdata(np.stack(means, axis=1), axis=1)
    of_x = stats.rankdata(x)
    ranks, of_x = ranks - ranks.mean(axis=1, keepdims=True), of_x - of_x.mean()
    lengths = np.sqrt((ranks**2).sum(axis=1) * (of_x**2).sum())
    found = (ranks @ of_x)[lengths > 0] / lengths[lengths > 0]
    if not found.size:
        return None
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
