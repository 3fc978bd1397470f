"""Distributions of t in training: drawn on the host, each from the stream of its sample's position."""

import numpy as np
from numpy.typing import NDArray

_LOW_HALF = np.uint64(0xFFFFFFFF)  # of 64 random bits: numpy takes 32 of them for a step or a float32


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
