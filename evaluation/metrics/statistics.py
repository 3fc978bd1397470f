"""Gaussian statistics of features, in float64, and the distance between two of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Gather = Callable[[NDArray[Any]], NDArray[Any]]  # concatenates rows of all processes
Cache = Callable[[str, Callable[[], NDArray[np.float64]]], NDArray[np.float64]]  # (name, compute) -> array

_NEGATIVE = 1e-3  # of the largest: far above what rounding leaves, also in a covariance stored in float32
_GATHERED_ROWS = 256  # of a matrix at once: what a process holds of all others' stays small


class Moments(Protocol):
    """Mean and covariance of a distribution of features."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """[D]."""
        ...

    @property
    def covariance(self) -> NDArray[np.float64]:
        """[D, D], symmetric."""
        ...

    @property
    def count(self) -> int | None:
        """Images that these are of, where that is known."""
        ...

    @property
    def max_rank(self) -> int:
        """What the covariance's rank cannot exceed: D, or fewer where there were too few images."""
        ...

    @property
    def root(self) -> NDArray[np.float64]:
        """[D, r]: R with covariance = R R^T; see `covariance_root`."""
        ...


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

    def merged(self, gather: Gather) -> "FeatureStatistics":
        """The sum over all processes."""
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
        """[D]."""
        return self.total / self.count

    @property
    def covariance(self) -> NDArray[np.float64]:
        """[D, D], unbiased (n - 1), as numpy.cov and ADM. ValueError for fewer than 2 images."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, but there are {self.count}; add more.")
        centred = self.outer - np.outer(self.total, self.total) / self.count
        return (centred + centred.T) / (2 * (self.count - 1))

    @property
    def max_rank(self) -> int:
        """Of n vectors less their mean: n - 1 at most."""
        return min(len(self.total), self.count - 1)

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """[D, r]."""
        return covariance_root(self.covariance, self.max_rank)


def _computed(name: str, compute: Callable[[], NDArray[np.float64]]) -> NDArray[np.float64]:
    return compute()


@dataclass(frozen=True)
class Gaussian:
    """A given mean and covariance, such as of a file; its root is taken from ``cache`` where that has it."""

    mean: NDArray[np.float64]  # [D]
    covariance: NDArray[np.float64]  # [D, D]
    count: int | None = None  # images that it is of, where that is known
    cache: Cache = field(default=_computed, compare=False)
    name: str = "The covariance"  # what errors call it

    @property
    def max_rank(self) -> int:
        """D, or n - 1."""
        return len(self.mean) if self.count is None else min(len(self.mean), self.count - 1)

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """[D, r]."""
        return self.cache("root", lambda: covariance_root(self.covariance, self.max_rank, self.name))


def covariance_root(
    covariance: NDArray[np.float64], max_rank: int, name: str = "The covariance"
) -> NDArray[np.float64]:
    """Return R [D, r] of a covariance [D, D] = R R^T; ``name`` stands in errors.

    Eigenvalues that are zero up to rounding, or beyond the ``max_rank`` largest, are left out. Raises ValueError for
    a matrix with negative ones, which is no covariance.
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
    """Squared 2-Wasserstein distance of the two Gaussians (Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root is that of (R^T C2 R)^(1/2) with
    C1 = R R^T, a symmetric eigenvalue problem: no matrix square root of a product, no complex numbers.
    Both covariances may be rank-deficient: eigenvalues that can only be rounding are left out, since the root
    of 1e-16 is 1e-8, and a thousand of them show. Give as ``first`` what is used often: its root is kept.
    """
    difference = first.mean - second.mean
    root, covariance = first.root, second.covariance
    values = np.linalg.eigvalsh(root.T @ covariance @ root)  # ascending
    trace_of_root = np.sqrt(np.maximum(values[max(0, len(values) - second.max_rank) :], 0.0)).sum()
    traces = np.trace(first.covariance) + np.trace(covariance)
    return float(difference @ difference + traces - 2.0 * trace_of_root)
