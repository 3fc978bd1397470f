"""The Gaussian process of diffusion: forward noising, its posterior, and what a prediction implies.

Equation numbers are those of Ho et al. 2020 (arXiv 2006.11239), unless noted. A step index t counts from 0,
so t here is the papers' t - 1. Tables are computed in float64 and used in float32.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.schedules import Schedule
from diffusion.variances import Variance


class Gaussian(NamedTuple):
    """A diagonal Gaussian. Both broadcast to [B, c, h, w] float32."""

    mean: Tensor
    log_variance: Tensor


class Tables(NamedTuple):
    """Coefficients of the process for each step, [T] float64."""

    betas: NDArray[np.float64]
    alphas_cumprod: NDArray[np.float64]
    alphas_cumprod_prev: NDArray[np.float64]  # of the step before; 1 at the first
    sqrt_alphas_cumprod: NDArray[np.float64]
    sqrt_one_minus_alphas_cumprod: NDArray[np.float64]
    sqrt_recip_alphas_cumprod: NDArray[np.float64]
    sqrt_recipm1_alphas_cumprod: NDArray[np.float64]
    posterior_variance: NDArray[np.float64]
    posterior_log_variance_clipped: NDArray[np.float64]
    log_betas: NDArray[np.float64]
    posterior_mean_coef1: NDArray[np.float64]
    posterior_mean_coef2: NDArray[np.float64]


_TABLES_ON_DEVICE = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance_clipped",
    "log_betas",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def make_tables(betas: NDArray[np.float64]) -> Tables:
    """All coefficients from beta_t (equations 4, 6 and 7)."""
    alphas_cumprod: NDArray[np.float64] = np.cumprod(1.0 - betas, dtype=np.float64)
    previous = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
    # The posterior of the first step is a point; its logarithm takes the second step's value (ADM).
    clipped = np.append(posterior_variance[min(1, len(betas) - 1)], posterior_variance[1:])
    return Tables(
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=previous,
        sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1.0 - alphas_cumprod),
        sqrt_recip_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod - 1.0),
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=np.log(np.maximum(clipped, 1e-20)),
        log_betas=np.log(betas),
        posterior_mean_coef1=betas * np.sqrt(previous) / (1.0 - alphas_cumprod),
        posterior_mean_coef2=(1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
    )


class GaussianDiffusion(nn.Module):
    """The process over the steps of ``schedule``, or over a subset of them (see `respace`).

    ``timesteps`` [S] int64 maps a step of this process to the t that the network was trained with.
    It is a module only so that its float32 tables move with `.to(device)`; it has no parameters or state.
    """

    timesteps: Tensor

    def __init__(self, schedule: Schedule, variance: Variance, kept_steps: NDArray[np.int64] | None = None) -> None:
        super().__init__()
        self.schedule = schedule
        self.variance = variance
        betas = schedule.betas()
        if kept_steps is None:
            kept_steps = np.arange(len(betas))
        else:
            betas = _betas_of_subset(betas, kept_steps)
        self.tables = make_tables(betas)
        self.register_buffer("timesteps", torch.from_numpy(kept_steps.astype(np.int64)), persistent=False)
        for name in _TABLES_ON_DEVICE:
            table = torch.from_numpy(getattr(self.tables, name)).float()
            self.register_buffer(f"_{name}", table, persistent=False)

    @property
    def num_steps(self) -> int:
        """S, steps of this process."""
        return len(self.tables.betas)

    def respace(self, kept_steps: NDArray[np.int64]) -> "GaussianDiffusion":
        """The process that visits only ``kept_steps`` of the schedule (Nichol & Dhariwal 2021, section 4)."""
        assert self.num_steps == len(self.schedule.betas()), "a respaced process is not respaced again"
        respaced = GaussianDiffusion(self.schedule, self.variance, kept_steps)
        return respaced.to(self.timesteps.device)

    def table(self, name: str, t: Tensor) -> Tensor:
        """Values of a table at steps [B] int64: [B, 1, 1, 1] float32."""
        return getattr(self, f"_{name}")[t].view(-1, 1, 1, 1)

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t given x_0 with the given noise (equation 4): [B, c, h, w]."""
        return self.table("sqrt_alphas_cumprod", t) * x_0 + self.table("sqrt_one_minus_alphas_cumprod", t) * noise

    def predict_x_0(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Invert `q_sample`: the x_0 that x_t and a noise prediction imply, [B, c, h, w]."""
        return self.table("sqrt_recip_alphas_cumprod", t) * x_t - self.table("sqrt_recipm1_alphas_cumprod", t) * noise

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | x_t, x_0) (equations 6 and 7), its log-variance clipped at the first step."""
        mean = self.table("posterior_mean_coef1", t) * x_0 + self.table("posterior_mean_coef2", t) * x_t
        return Gaussian(mean, self.table("posterior_log_variance_clipped", t))

    def p_reverse(self, output: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """p(x_{t-1} | x_t) that a network's output implies (equation 11; variance by its class)."""
        noise, logits = self.variance.split(output.float(), x_t.shape[1])
        mean = self.q_posterior(self.predict_x_0(x_t, t, noise), x_t, t).mean
        log_variance = self.variance.log_variance(
            logits, self.table("posterior_log_variance_clipped", t), self.table("log_betas", t), t
        )
        return Gaussian(mean, log_variance)


def _betas_of_subset(betas: NDArray[np.float64], kept_steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Betas of the process that jumps between kept steps and keeps their alphas_cumprod."""
    kept = np.cumprod(1.0 - betas)[kept_steps]
    return 1.0 - kept / np.append(1.0, kept[:-1])
