"""The Gaussian diffusion process: forward noising, its posterior, the reverse step and the loss.

Equation numbers are those of Ho et al. 2020 (arXiv 2006.11239), unless noted. A step index t counts from 0,
so t here is the papers' t - 1. Tables are computed in float64 and used in float32.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.batch import Batch
from diffusion.gaussians import Gaussian, discretized_log_likelihood, gaussian_kl
from diffusion.objective import LOSS, Objective, Prediction, mean_per_sample, named
from diffusion.paths import Coefficients
from diffusion.predictions import Parameterization, PredictNoise
from diffusion.schedules import Schedule
from diffusion.times import UniformSteps
from diffusion.variances import Variance
from diffusion.weightings import Unweighted, Weighting

_NOISE, _UNWEIGHTED = PredictNoise(), Unweighted()


class Tables(NamedTuple):
    """Coefficients of the process for each step, [S] float64."""

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
    """Return all coefficients of beta_t (equations 4, 6 and 7)."""
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


class GaussianDiffusion(Objective):
    """The process over the steps of ``schedule``, or over a subset of them (see `respace`).

    The network predicts the noise, or another ``prediction``, and, where ``variance`` is learned, its logits; L_simple
    + L_vlb is minimized (paper, section 3.1; Nichol & Dhariwal 2021), L_simple with a ``weighting``. ``timesteps`` [S]
    int64 maps a step of this process to the t that the network was trained with. Raises ValueError for a prediction or
    weighting that derivatives by t define.
    """

    name = "gaussian"
    timesteps: Tensor

    def __init__(
        self,
        schedule: Schedule,
        variance: Variance,
        kept_steps: NDArray[np.int64] | None = None,
        prediction: Parameterization = _NOISE,
        weighting: Weighting = _UNWEIGHTED,
    ) -> None:
        super().__init__()
        for part, choice in (("prediction", prediction), ("weighting", weighting)):
            if choice.needs_rates:
                raise ValueError(
                    f"diffusion/{part}={choice.name} needs a path that is continuous in time, which diffusion=gaussian "
                    f"is not; use diffusion=flow, or another diffusion/{part}."
                )
        self.parameterization, self.weighting = prediction, weighting
        self.schedule = schedule
        self.variance = variance
        betas = schedule.betas()
        if kept_steps is None:
            kept_steps = np.arange(len(betas))
        else:
            betas = _betas_of_subset(betas, kept_steps)
        self.tables = make_tables(betas)
        self.times = UniformSteps(self.num_steps)
        self.outputs_per_channel = variance.outputs_per_channel
        self.register_buffer("timesteps", torch.from_numpy(kept_steps.astype(np.int64)), persistent=False)
        for name in _TABLES_ON_DEVICE:
            table = torch.from_numpy(getattr(self.tables, name)).float()
            self.register_buffer(f"_{name}", table, persistent=False)

    @property
    def num_steps(self) -> int:
        """Return S, the number of steps of this process."""
        return len(self.tables.betas)

    def respace(self, kept_steps: NDArray[np.int64]) -> "GaussianDiffusion":
        """Return the process that visits only ``kept_steps`` of the schedule (Nichol & Dhariwal 2021, section 4)."""
        assert self.num_steps == len(self.schedule.betas()), "a respaced process is not respaced again"
        respaced = GaussianDiffusion(self.schedule, self.variance, kept_steps, self.parameterization, self.weighting)
        return respaced.to(self.timesteps.device)

    def table(self, name: str, t: Tensor) -> Tensor:
        """Return the values of a table at steps [B] int64: [B, 1, 1, 1] float32."""
        return getattr(self, f"_{name}")[t].view(-1, 1, 1, 1)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at steps [B] int64 (equation 4)."""
        return self.table("sqrt_alphas_cumprod", t), self.table("sqrt_one_minus_alphas_cumprod", t)

    def facts(self) -> dict[str, str | float]:
        """Return the names of the process, the prediction and the weighting."""
        return {"name": self.name, "prediction": named(self.parameterization), "weighting": named(self.weighting)}

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of x_t at steps [B] int64, without derivatives."""
        names = "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"
        return Coefficients(*self.alpha_sigma(t), *(self.table(name, t) for name in names))

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t unchanged, and the trained steps of the steps t [B] int64."""
        return x_t, self.timesteps[t]

    def from_inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t unchanged, and the closest steps [B] int64 of the whole process."""
        assert self.num_steps == len(self.schedule.betas()), "a respaced process does not have every trained step"
        return x_t, t.float().round().long()

    def time_range(self) -> tuple[float, float]:
        """Return the first and the last step of the schedule."""
        return 0.0, len(self.schedule.betas()) - 1.0

    def seen(self, t: float) -> float:
        """Return a trained step unchanged: it is what the network sees, of this process and of respaced ones."""
        return t

    def level(self, t: Tensor) -> Tensor:
        """Return t / S of steps t [B]: [B] float32 in [0, 1)."""
        return t / self.num_steps

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Return what the network's output implies; ``variance`` interprets its logits."""
        predicted, logits = self.variance.split(output.float(), x_t.shape[1])
        log_variance = self.variance.log_variance(
            logits, self.table("posterior_log_variance_clipped", t), self.table("log_betas", t), t
        )
        return Prediction(*self.parameterization.ends(predicted, x_t, self.coefficients(t)), log_variance)

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """Return q(x_{t-1} | x_t, x_0) (equations 6 and 7), its log-variance clipped at the first step."""
        mean = self.table("posterior_mean_coef1", t) * x_0 + self.table("posterior_mean_coef2", t) * x_t
        return Gaussian(mean, self.table("posterior_log_variance_clipped", t))

    def p_reverse(self, predicted: Prediction, x_t: Tensor, t: Tensor) -> Gaussian:
        """Return p(x_{t-1} | x_t) that a prediction implies (equation 11)."""
        assert predicted.log_variance is not None
        return Gaussian(self.q_posterior(predicted.x_0, x_t, t).mean, predicted.log_variance)

    def losses(self, output: Tensor, batch: Batch, x_t: Tensor) -> dict[str, Tensor]:
        """Return L_simple (``mse``), L_vlb (``vlb``, in bits; 0 with a fixed variance) and their sum, [B] each.

        L_simple is the weighted error of what is predicted. L_vlb sees the mean through a stopped gradient, so it
        trains only the variance.
        """
        predicted, logits = self.variance.split(output.float(), x_t.shape[1])
        coefficients = self.coefficients(batch.t)
        target = self.parameterization.target(batch.x_0, batch.noise, coefficients)
        errors = mean_per_sample((target - self.parameterization.scaled(predicted, coefficients)) ** 2)
        mse = self.weighting.weigh(errors, self.parameterization, coefficients)
        if logits is None:
            return {LOSS: mse, "mse": mse, "vlb": torch.zeros_like(mse)}
        frozen_mean = torch.cat([predicted.detach(), logits], dim=1)
        vlb = self.vlb_term(self.prediction(frozen_mean, x_t, batch.t), batch.x_0, x_t, batch.t)
        return {LOSS: mse + vlb, "mse": mse, "vlb": vlb}

    def vlb_term(self, predicted: Prediction, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return one term of the variational bound, [B] bits per dimension (equations 5 and 13).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) by the discretized decoder
        at t = 0.
        """
        true, model = self.q_posterior(x_0, x_t, t), self.p_reverse(predicted, x_t, t)
        divergence = mean_per_sample(gaussian_kl(true, model))
        decoder = -mean_per_sample(discretized_log_likelihood(x_0, model))
        return torch.where(t == 0, decoder, divergence) / math.log(2.0)


def require_gaussian(objective: Objective, who: str) -> GaussianDiffusion:
    """Return the objective. Raises ValueError where it is not the Gaussian process, which ``who`` needs."""
    if not isinstance(objective, GaussianDiffusion):
        raise ValueError(
            f"{who} needs diffusion=gaussian, but the objective is diffusion={objective.name}; leave it out, or use "
            "one that fits."
        )
    return objective


def _betas_of_subset(betas: NDArray[np.float64], kept_steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the betas of the process that jumps between kept steps and keeps their alphas_cumprod."""
    kept = np.cumprod(1.0 - betas)[kept_steps]
    return 1.0 - kept / np.append(1.0, kept[:-1])
