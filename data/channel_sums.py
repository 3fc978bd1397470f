"""Compute sums per channel of a shard's moments, and from the sums of all shards the statistics of latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from data.manifest import Finite

_ROUNDING = 2e-3  # relative; the encode job sums before values are rounded to float16


@dataclass(frozen=True)
class ChannelSums:
    """The float64 sums per channel, over ``count`` values, of the mean and of mean^2 + variance."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    count: Annotated[int, Field(ge=0)]
    mean: list[Finite]
    square: list[Annotated[Finite, Field(ge=0)]]

    @property
    def is_finite(self) -> bool:
        """Return whether every log-variance gives a finite variance."""
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.square).all())

    def agrees(self, other: "ChannelSums") -> bool:
        """Return whether both can be sums of the same latents, allowing for rounding to float16 in one of them."""
        if (self.count, len(self.mean), len(self.square)) != (other.count, len(other.mean), len(other.square)):
            return False
        typical = np.sqrt(np.maximum(self.square, other.square) * self.count)  # the sum if all latents had one sign
        means_agree = np.abs(np.subtract(self.mean, other.mean)) <= _ROUNDING * max(typical, default=0.0)
        return bool(means_agree.all() and np.allclose(self.square, other.square, rtol=5 * _ROUNDING))


def channel_sums(moments: NDArray[np.floating], channels: int) -> ChannelSums:
    """Return the sums over moments [num_samples, orientations, 2c, h, w], in float64."""
    mean = moments[:, :, :channels].astype(np.float64)
    with np.errstate(over="ignore"):
        variance = np.exp(moments[:, :, channels:].astype(np.float64))
    axes = (0, 1, 3, 4)
    return ChannelSums(mean.size // channels, mean.sum(axes).tolist(), (mean**2 + variance).sum(axes).tolist())


def total(parts: Sequence[ChannelSums], channels: int) -> ChannelSums:
    """Return the sums over all parts together."""
    mean = np.sum([part.mean for part in parts], axis=0) if parts else np.zeros(channels)
    square = np.sum([part.square for part in parts], axis=0) if parts else np.zeros(channels)
    return ChannelSums(sum(part.count for part in parts), mean.tolist(), square.tolist())


def channel_statistics(parts: Sequence[ChannelSums]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of latents drawn from the posterior.

    E[z] = E[mean] and Var[z] = E[mean^2 + variance] - E[z]^2.
    """
    count = sum(part.count for part in parts)
    mean = np.sum([part.mean for part in parts], axis=0) / count
    square = np.sum([part.square for part in parts], axis=0) / count
    return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0.0)).tolist()


def statistics_agree(found: Sequence[float], expected: Sequence[float], std: Sequence[float]) -> bool:
    """Return whether two statistics of latents with standard deviation ``std`` agree up to rounding to float16."""
    return np.allclose(found, expected, rtol=_ROUNDING, atol=_ROUNDING * max(std))
