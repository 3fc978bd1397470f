"""Distributions of t in training: drawn on the host, each from the stream of its sample's position."""

import numpy as np


class UniformSteps:
    """Whole steps with equal probability: {0, ..., num_steps - 1} (Ho et al. 2020, algorithm 1)."""

    dtype = np.dtype(np.int64)

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def draw(self, generator: np.random.Generator) -> int:
        """Return a step."""
        return int(generator.integers(self.num_steps))


class UniformTimes:
    """Continuous times, uniform in [0, 1)."""

    dtype = np.dtype(np.float32)

    def draw(self, generator: np.random.Generator) -> float:
        """Return a time, a multiple of 2^-24, so that rounding to float32 never gives 1."""
        return float(generator.random(dtype=np.float32))
