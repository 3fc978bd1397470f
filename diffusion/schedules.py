"""Noise schedules: each gives the variances beta_t of the forward process."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MOST_STEPS = 100_000  # a process has tables with an entry for each step


class Schedule(Protocol):
    """A sequence of forward-process variances."""

    def betas(self) -> NDArray[np.float64]:
        """Return the betas of all steps: [S] float64 in (0, 1)."""
        ...


class LinearSchedule:
    """Linear betas (Ho et al. 2020, section 4; paper, section 4: 1,000 steps from 1e-4 to 2e-2)."""

    def __init__(self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> None:
        if not 1 <= num_steps <= MOST_STEPS or not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"A linear schedule needs num_steps in 1 to {MOST_STEPS} and 0 < beta_start <= beta_end < 1, but got "
                f"{num_steps}, {beta_start} and {beta_end}; the paper uses 1000, 1e-4 and 2e-2."
            )
        self.num_steps = num_steps
        self.beta_start = beta_start
        self.beta_end = beta_end

    def betas(self) -> NDArray[np.float64]:
        """Return the betas, [num_steps] float64."""
        return np.linspace(self.beta_start, self.beta_end, self.num_steps, dtype=np.float64)


class ScaledLinearSchedule:
    """Betas whose square roots are linear (Rombach et al. 2022, released latent-diffusion code)."""

    def __init__(self, num_steps: int = 1000, beta_start: float = 8.5e-4, beta_end: float = 1.2e-2) -> None:
        if not 0 < beta_start <= beta_end < 1:
            LinearSchedule(num_steps, beta_start, beta_end)  # says what is wrong with them
        self._roots = LinearSchedule(num_steps, beta_start**0.5, beta_end**0.5)

    def betas(self) -> NDArray[np.float64]:
        """Return the betas, [num_steps] float64."""
        return self._roots.betas() ** 2


class CosineSchedule:
    """Cosine alphas_cumprod (Nichol & Dhariwal 2021, equation 17), betas clipped at ``max_beta``."""

    def __init__(self, num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> None:
        if not 1 <= num_steps <= MOST_STEPS or offset < 0 or not 0 < max_beta < 1:
            raise ValueError(
                f"A cosine schedule needs num_steps in 1 to {MOST_STEPS}, offset >= 0 and 0 < max_beta < 1, but got "
                f"{num_steps}, {offset} and {max_beta}; its paper uses 1000, 0.008 and 0.999."
            )
        self.num_steps = num_steps
        self.offset = offset
        self.max_beta = max_beta

    def betas(self) -> NDArray[np.float64]:
        """Return the betas, [num_steps] float64."""
        t = np.arange(self.num_steps + 1, dtype=np.float64) / self.num_steps
        alphas_cumprod = np.cos((t + self.offset) / (1 + self.offset) * np.pi / 2) ** 2
        return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], self.max_beta)
