"""Gaussian statistics of features, in float64, and the distance between two of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over n feature vectors of dimension D; sums of parts add up to those of the whole."""

    count: int
    total: NDArray[np.float64]  # [D], sum of x
    outer: NDArray[np.float64]  # [D, D], sum of x x^T

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> "FeatureStatistics":
        """Statistics of [n, D] features."""
        exact = features.astype(np.float64)
        return cls(len(exact), exact.sum(axis=0), exact.T @ exact)

    @classmethod
    def empty(cls, size: int) -> "FeatureStatistics":
        """Statistics of no features of dimension ``size``."""
        return cls(0, np.zeros(size), np.zeros((size, size)))

    def merged(self, gather: Callable[[NDArray[Any]], NDArray[Any]]) -> "FeatureStatistics":
        """The sum over all processes; ``gather`` concatenates rows of all of them."""
        counts = gather(np.array([self.count]))
        totals, outers = gather(self.total[np.newaxis]), gather(self.outer[np.newaxis])
        return FeatureStatistics(int(counts.sum()), totals.sum(axis=0), outers.sum(axis=0))

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> NDArray[np.float64]:
        """[D]."""
        return self.total / self.count

    @property
    def covariance(self) -> NDArray[np.float64]:
        """[D, D], unbiased (n - 1), as numpy.cov and ADM. ValueError for fewer than 2 images."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, but there are {self.count}; add more.")
        centred = self.outer - np.outer(self.total, self.total) / self.count
        return (centred + centred.T) / (2 * (self.count - 1))


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared 2-Wasserstein distance of the two Gaussians (Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root is that of (R^T C2 R)^(1/2) with
    C1 = R R^T, a symmetric eigenvalue problem: no matrix square root of a product, no complex numbers.
    Eigenvalues of C1 that are zero up to rounding are dropped, so covariances may be rank-deficient.
    """
    difference = first.mean - second.mean
    values, vectors = np.linalg.eigh(first.covariance)
    floor = len(values) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    kept = values > floor
    root = vectors[:, kept] * np.sqrt(values[kept])
    middle = root.T @ second.covariance @ root
    trace_of_root = np.sqrt(np.maximum(np.linalg.eigvalsh(middle), 0.0)).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(difference @ difference + traces - 2.0 * trace_of_root)
