"""Distributions of t in training: drawn on the host, each from the stream of its sample's position.

A time that is not uniform is a quantile of its distribution at a uniform number, computed by Python's own functions for
one sample at a time: so it is the same in any batch, and by whichever code the random bits were drawn.
"""

import math
from statistics import NormalDist
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from core.draws import Times, TimesOfWords

_LOW_HALF = np.uint64(0xFFFFFFFF)  # of 64 random bits: numpy takes 32 of them for a step or a float32
_NORMAL = NormalDist()


def draws_levels(times: Times) -> bool:
    """Return whether these are noise levels in (0, infinity), not times in [0, 1]."""
    return getattr(times, "are_levels", False)


class UniformSteps:
    """Whole steps with equal probability: {0, ..., num_steps - 1} (Ho et al. 2020, algorithm 1)."""

    dtype = np.dtype(np.int64)

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def draw(self, generator: np.random.Generator) -> int:
        """Return a step."""
        return int(generator.integers(self.num_steps))

    def of_words(self, words: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the steps of these random bits, and where numpy may reject the bits, to be unbiased (Lemire 2019)."""
        products = (words & _LOW_HALF) * np.uint64(self.num_steps)
        return (products >> np.uint64(32)).astype(np.int64), (products & _LOW_HALF) < np.uint64(self.num_steps)

    def of_bits(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the highest bits of words x steps; probabilities differ by less than 2^-64."""
        steps, half = np.uint64(self.num_steps), np.uint64(32)
        return (((words >> half) * steps + ((words & _LOW_HALF) * steps >> half)) >> half).astype(np.int64)


class UniformTimes:
    """Continuous times, uniform in [0, 1)."""

    name: ClassVar[str] = "uniform"
    dtype = np.dtype(np.float32)

    def draw(self, generator: np.random.Generator) -> float:
        """Return a time, a multiple of 2^-24, so that rounding to float32 never gives 1."""
        return float(generator.random(dtype=np.float32))

    def of_words(self, words: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the times of these random bits, which always suffice."""
        times = ((words & _LOW_HALF) >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
        return times, np.zeros(len(words), dtype=bool)

    def of_bits(self, words: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Return multiples of 2^-24 below 1, from the highest bits."""
        return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


class _NormalTimes:
    """Times that are a function of location + scale z, z standard normal: the quantile of 52 random bits."""

    name: ClassVar[str]
    are_levels: ClassVar[bool] = False  # noise levels in (0, infinity), not times in [0, 1]
    dtype = np.dtype(np.float32)

    def __init__(self, location: float, scale: float) -> None:
        if not math.isfinite(location) or not 0 < scale < math.inf:
            raise ValueError(
                f"diffusion.times has location {location} and scale {scale}, but {self.name} needs finite numbers and "
                "a scale above 0."
            )
        self.location, self.scale = location, scale

    def of_normal(self, normal: float) -> float:
        """Return the time of a normal number with this location and scale."""
        raise NotImplementedError

    def draw(self, generator: np.random.Generator) -> float:
        """Return a time, rounded to float32."""
        return self._of_word(int(generator.bit_generator.random_raw()))

    def of_words(self, words: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the times of these random bits, which always suffice."""
        times = np.array([self._of_word(word) for word in words.tolist()], dtype=np.float32)
        return times, np.zeros(len(words), dtype=bool)

    def of_bits(self, words: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Return the same as `of_words`."""
        return self.of_words(words)[0]

    def _of_word(self, word: int) -> float:
        uniform = ((word >> 12) + 0.5) * 2.0**-52  # exact, and never 0 or 1
        return float(np.float32(self.of_normal(self.location + self.scale * _NORMAL.inv_cdf(uniform))))


class LogitNormalTimes(_NormalTimes):
    """Times sigmoid(location + scale z) in (0, 1) (Esser et al. 2024, section 3.1); location > 0 prefers noise."""

    name = "logit_normal"

    def __init__(self, location: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(location, scale)

    def of_normal(self, normal: float) -> float:
        """Return the sigmoid."""
        return 1 / (1 + math.exp(-normal)) if normal > 0 else math.exp(normal) / (1 + math.exp(normal))


class LogNormalLevels(_NormalTimes):
    """Noise levels exp(location + scale z) (Karras et al. 2022, table 1: -1.2 and 1.2)."""

    name = "log_normal"
    are_levels = True

    def __init__(self, location: float = -1.2, scale: float = 1.2) -> None:
        super().__init__(location, scale)

    def of_normal(self, normal: float) -> float:
        """Return the exponential, limited so that its square is a float32."""
        return math.exp(min(max(normal, -40.0), 40.0))


class MovedTimes:
    """Times t of another distribution, shifted by t' = shift t / (1 + (shift - 1) t), then scaled to [low, high]."""

    dtype = np.dtype(np.float32)

    def __init__(self, times: Times, shift: float, low: float, high: float) -> None:
        if not 0 < shift < math.inf:
            raise ValueError(f"diffusion.shift is {shift}, but it must be above 0; 1 leaves times as they are.")
        self.times, self.shift, self.low, self.high = times, shift, low, high

    @classmethod
    def of(cls, times: Times, shift: float, low: float, high: float) -> Times:
        """Return the moved times, or ``times`` themselves where nothing moves."""
        moved = cls(times, shift, low, high)
        return times if (shift, low, high) == (1, 0, 1) else moved

    def draw(self, generator: np.random.Generator) -> float:
        """Return a time, rounded to float32."""
        return float(self._moved(np.array(self.times.draw(generator))))

    def of_words(self, words: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the times of these random bits, and where more bits decide."""
        if not isinstance(self.times, TimesOfWords):
            return np.zeros(len(words), np.float32), np.ones(len(words), dtype=bool)
        found, remaining = self.times.of_words(words)
        return self._moved(found), remaining

    def of_bits(self, words: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Return the moved times of these random bits."""
        return self._moved(self.times.of_bits(words))

    def _moved(self, times: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return the moved times. Sums, products and quotients of float64 are rounded alike everywhere."""
        t = times.astype(np.float64)
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return (self.low + (self.high - self.low) * t).astype(np.float32)
