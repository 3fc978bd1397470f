"""Samplers: free functions over any denoiser. All noise is given to them; they read nothing back."""

from typing import Protocol

import torch
from torch import Tensor

from diffusion.batch import Condition
from diffusion.process import GaussianDiffusion
from diffusion.protocol import Denoiser
from diffusion.respacing import Steps, kept_steps


class Noise(Protocol):
    """Standard normals of a batch of images, one tensor a draw."""

    def __call__(self, draw: int) -> Tensor:
        """The draw'th tensor [B, c, h, w] float32; draw 0 is the start x_T, draw i the i-th step's."""
        ...


class Sampler(Protocol):
    """Takes noise to samples."""

    def __call__(self, denoiser: Denoiser, process: GaussianDiffusion, noise: Noise, condition: Condition) -> Tensor:
        """Return [B, c, h, w] float32 samples of x_0; the noise has the number of rows, the condition as many."""
        ...


def step_of_rows(x: Tensor, step: int) -> Tensor:
    """Return a step as the t of every row of x: [B] int64."""
    return torch.full((len(x),), step, dtype=torch.int64, device=x.device)


def ddpm(
    denoiser: Denoiser,
    process: GaussianDiffusion,
    noise: Noise,
    condition: Condition,
    steps: Steps = 250,
) -> Tensor:
    """Ancestral sampling over respaced ``steps`` (Ho et al. 2020, algorithm 2): [B, c, h, w].

    Raises ValueError for ``steps`` that the trained process does not have (see `kept_steps`).
    """
    respaced = process.respace(kept_steps(process.num_steps, steps))
    x = noise(0)
    for draw, step in enumerate(reversed(range(respaced.num_steps)), start=1):
        t = step_of_rows(x, step)
        reverse = respaced.p_reverse(denoiser(x, respaced.timesteps[t], condition), x, t)
        x = reverse.mean
        if step > 0:  # the last step returns the mean
            x = x + torch.exp(0.5 * reverse.log_variance) * noise(draw)
    return x


def ddim(
    denoiser: Denoiser,
    process: GaussianDiffusion,
    noise: Noise,
    condition: Condition,
    steps: Steps = 50,
    eta: float = 0.0,
) -> Tensor:
    """Implicit sampling (Song et al. 2020, equation 12): [B, c, h, w]; ``eta`` 0 is deterministic, 1 is ancestral.

    Raises ValueError for ``steps`` that the trained process does not have, or an ``eta`` outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta is {eta}, but it must be between 0 (deterministic) and 1 (ancestral).")
    respaced = process.respace(kept_steps(process.num_steps, steps))
    x = noise(0)
    for draw, step in enumerate(reversed(range(respaced.num_steps)), start=1):
        t = step_of_rows(x, step)
        output = denoiser(x, respaced.timesteps[t], condition).float()
        predicted, _ = respaced.variance.split(output, x.shape[1])
        alpha, previous = respaced.table("alphas_cumprod", t), respaced.table("alphas_cumprod_prev", t)
        sigma = eta * torch.sqrt((1 - previous) / (1 - alpha)) * torch.sqrt(1 - alpha / previous)
        direction = torch.sqrt(1 - previous - sigma**2) * predicted
        x = torch.sqrt(previous) * respaced.predict_x_0(x, t, predicted) + direction
        if eta > 0 and step > 0:
            x = x + sigma * noise(draw)
    return x
