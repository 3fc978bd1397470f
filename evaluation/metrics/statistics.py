"""Compute Gaussian statistics of features, in float64, and the distance between two of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Gather = Callable[[NDArray[Any]], NDArray[Any]]  # concatenates the rows of all processes
Cache = Callable[[str, Callable[[], NDArray[np.float64]]], NDArray[np.float64]]  # (name, compute) -> array

_NEGATIVE = 1e-3  # relative to the largest eigenvalue; far above rounding errors, also of a float32 covariance
_GATHERED_ROWS = 256  # rows of a matrix gathered at once, so that a process needs little memory for those of others


class Moments(Protocol):
    """The mean and covariance of a distribution of features."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Return the mean, [D]."""
        ...

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Return the covariance, [D, D], symmetric."""
        ...

    @property
    def count(self) -> int | None:
        """Return the number of images, or None if unknown."""
        ...

    @property
    def max_rank(self) -> int:
        """Return an upper bound of the covariance's rank: D, or less if there were too few images."""
        ...

    @property
    def root(self) -> NDArray[np.float64]:
        """Return R [D, r] with covariance = R R^T; see `covariance_root`."""
        ...


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over n feature vectors of dimension D; the sums of parts add up to those of the whole."""

    count: int
    total: NDArray[np.float64]  # [D], sum of x
    outer: NDArray[np.float64]  # [D, D], sum of x x^T

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> "FeatureStatistics":
        """Return the statistics of features [n, D]."""
        exact = features.astype(np.float64)
        return cls(len(exact), exact.sum(axis=0), exact.T @ exact)

    @classmethod
    def empty(cls, size: int) -> "FeatureStatistics":
        """Return the statistics of no features of dimension ``size``."""
        return cls(0, np.zeros(size), np.zeros((size, size)))

    def merged(self, gather: Gather) -> "FeatureStatistics":
        """Return the sums over all processes."""
        counts, totals = gather(np.array([self.count])), gather(self.total[np.newaxis])
        outer = np.empty_like(self.outer)
        for start in range(0, len(outer), _GATHERED_ROWS):
            rows = slice(start, start + _GATHERED_ROWS)
            outer[rows] = gather(self.outer[np.newaxis, rows]).sum(axis=0)
        return FeatureStatistics(int(counts.sum()), totals.sum(axis=0), outer)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Return the mean, [D]."""
        return self.total / self.count

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Return the unbiased covariance (n - 1, as numpy.cov and ADM), [D, D]. Raises ValueError if n < 2."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, but there are {self.count}; add more.")
        centered = self.outer - np.outer(self.total, self.total) / self.count
        return (centered + centered.T) / (2 * (self.count - 1))

    @property
    def max_rank(self) -> int:
        """Return min(D, n - 1), since n vectors minus their mean have rank n - 1 at most."""
        return min(len(self.total), self.count - 1)

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """Return the covariance's root, [D, r]."""
        return covariance_root(self.covariance, self.max_rank)


def _computed(name: str, compute: Callable[[], NDArray[np.float64]]) -> NDArray[np.float64]:
    return compute()


@dataclass(frozen=True)
class Gaussian:
    """A given mean and covariance, for example from a file; ``cache`` stores the root."""

    mean: NDArray[np.float64]  # [D]
    covariance: NDArray[np.float64]  # [D, D]
    count: int | None = None  # number of images, if known
    cache: Cache = field(default=_computed, compare=False)
    name: str = "The covariance"  # its name in errors

    @property
    def max_rank(self) -> int:
        """Return D, or n - 1 if n is known and that is smaller."""
        return len(self.mean) if self.count is None else min(len(self.mean), self.count - 1)

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """Return the covariance's root, [D, r]."""
        return self.cache("root", lambda: covariance_root(self.covariance, self.max_rank, self.name))


def covariance_root(
    covariance: NDArray[np.float64], max_rank: int, name: str = "The covariance"
) -> NDArray[np.float64]:
    """Return R [D, r] of a covariance [D, D] = R R^T; errors mention ``name``.

    Eigenvalues that are zero up to rounding, or are not among the ``max_rank`` largest, are dropped. Raises ValueError
    for a matrix with negative eigenvalues, which is not a covariance.
    """
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -_NEGATIVE * np.abs(values).max():
        raise ValueError(
            f"{name} has an eigenvalue of {values[0]:.6g}, but a covariance has none below 0; fetch or make the "
            "reference again."
        )
    floor = len(values) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    kept = values > floor
    kept[: len(values) - max_rank] = False
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return the squared 2-Wasserstein distance of the two Gaussians (Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root equals that of (R^T C2 R)^(1/2) with
    C1 = R R^T, a symmetric eigenvalue problem without a matrix square root of a product or complex numbers.
    Both covariances may be rank-deficient: eigenvalues that can only be rounding errors are dropped, since the root
    of 1e-16 is 1e-8, and a thousand of these are visible. Pass the distribution that is used often as ``first``, whose
    root is cached.
    """
    difference = first.mean - second.mean
    root, covariance = first.root, second.covariance
    values = np.linalg.eigvalsh(root.T @ covariance @ root)  # ascending
    trace_of_root = np.sqrt(np.maximum(values[max(0, len(values) - second.max_rank) :], 0.0)).sum()
    traces = np.trace(first.covariance) + np.trace(covariance)
    return float(difference @ difference + traces - 2.0 * trace_of_root)
