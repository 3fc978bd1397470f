"""Samplers: free functions over any denoiser. All noise is given to them; they read nothing back."""

from typing import Protocol

import torch
from torch import Tensor

from diffusion.process import GaussianDiffusion
from diffusion.protocol import Denoiser
from diffusion.respacing import evenly_spaced


class Noise(Protocol):
    """Standard normals of a batch of images, one tensor a draw."""

    def __call__(self, draw: int) -> Tensor:
        """The draw'th tensor [B, c, h, w] float32; draw 0 is the start x_T, draw i the i-th step's."""
        ...


class Sampler(Protocol):
    """Takes noise to samples."""

    def __call__(self, denoiser: Denoiser, process: GaussianDiffusion, noise: Noise, label: Tensor) -> Tensor:
        """[B] int64 labels -> [B, c, h, w] float32 samples of x_0."""
        ...


def ddpm(
    denoiser: Denoiser,
    process: GaussianDiffusion,
    noise: Noise,
    label: Tensor,
    steps: int = 250,
) -> Tensor:
    """Ancestral sampling over ``steps`` evenly respaced steps (Ho et al. 2020, algorithm 2): [B, c, h, w].

    Raises ValueError where ``steps`` exceeds the trained steps.
    """
    respaced = process.respace(evenly_spaced(process.num_steps, steps))
    x = noise(0)
    for draw, step in enumerate(reversed(range(steps)), start=1):
        t = torch.full_like(label, step)
        reverse = respaced.p_reverse(denoiser(x, respaced.timesteps[t], label), x, t)
        x = reverse.mean
        if step > 0:  # the last step returns the mean
            x = x + torch.exp(0.5 * reverse.log_variance) * noise(draw)
    return x
