"""Noise schedules: each gives the variances beta_t of the forward process."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Schedule(Protocol):
    """A sequence of forward-process variances."""

    def betas(self) -> NDArray[np.float64]:
        """beta_1 .. beta_T: [T] float64 in (0, 1)."""
        ...


class LinearSchedule:
    """Linear betas (Ho et al. 2020, section 4; paper, section 4: 1,000 steps from 1e-4 to 2e-2)."""

    def __init__(self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> None:
        if num_steps < 1 or not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"A linear schedule needs num_steps >= 1 and 0 < beta_start <= beta_end < 1, but got "
                f"{num_steps}, {beta_start} and {beta_end}; the paper uses 1000, 1e-4 and 2e-2."
            )
        self.num_steps = num_steps
        self.beta_start = beta_start
        self.beta_end = beta_end

    def betas(self) -> NDArray[np.float64]:
        """[num_steps] float64."""
        return np.linspace(self.beta_start, self.beta_end, self.num_steps, dtype=np.float64)
