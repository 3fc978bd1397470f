"""Define the KL-regularized autoencoder of latent diffusion (Rombach et al. 2022), loaded by diffusers."""

from typing import ClassVar

import torch
from torch import Tensor

from core.latents import compiled_latents, drawn_latents
from core.samples import Latents
from model.autoencoder_folder import FolderAutoencoder


class DiffusersAutoencoder(FolderAutoencoder):
    """diffusers' ``AutoencoderKL``, whose moments are those of a Gaussian posterior; in the paper, scale is 0.18215."""

    usual_latents: ClassVar[tuple[int, int] | None] = (8, 4)  # Stable Diffusion's
    diffusers_class = "AutoencoderKL"
    default_scale = 0.18215  # diffusers fills in Stable Diffusion's too

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W] float32 in [-1, 1] to [B, 2c, h, w] float32: mean, then log-variance."""
        with self._exact(images.device):
            posterior = self._network.encode(images.to(self._network.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    def draw(self, moments: Tensor, posterior: Tensor, out: Tensor | None = None) -> Tensor:
        """Return latents x_0 [B, c, h, w] float32 from moments [B, 2c, h, w] and standard normals [B, c, h, w]."""
        return drawn_latents(moments, posterior, self._shift, self._scale, out)

    def compiled_draw(self) -> Latents | None:
        """Return the compiled function by which `draw` draws from float16 on the CPU, or None where PyTorch does."""
        return compiled_latents(self._shift, self._scale)
