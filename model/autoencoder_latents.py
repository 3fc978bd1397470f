"""Define autoencoders without a posterior, loaded by diffusers: the encoder gives a latent, and nothing is drawn."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from core.precision import exact_float32
from model.autoencoder import IdentityAutoencoder
from model.autoencoder_folder import FolderAutoencoder


class LatentAutoencoder(FolderAutoencoder):
    """An autoencoder of diffusers whose ``encode`` returns a latent; in moments, a constant fills the log-variance."""

    encoded: ClassVar[str] = "latents"  # attribute of the encoder's output

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W] float32 in [-1, 1] to [B, 2c, h, w] float32: the latent, then a constant."""
        with self._exact(images.device):
            encoded = self._network.encode(images.to(self._network.dtype))
        latent: Tensor = getattr(encoded, self.encoded).float()
        return torch.cat([latent, torch.full_like(latent, IdentityAutoencoder.log_variance)], dim=1)

    def draw(self, moments: Tensor, posterior: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the scaled latent x_0 of the moments: [B, 2c, h, w] -> [B, c, h, w] float32. Nothing is drawn."""
        latent = moments[:, : self.channels].float()
        scaled = (latent - self._shift.to(latent.device)) * self._scale.to(latent.device)
        return scaled if out is None else out.copy_(scaled)


class VQAutoencoder(LatentAutoencoder):
    """diffusers' ``VQModel``: latents are those before quantization, and `decode` replaces each by its nearest code.

    So diffusion sees continuous latents, as in latent diffusion (Rombach et al. 2022). Codes are chosen in float32.
    """

    diffusers_class = "VQModel"
    _codes: Tensor  # [K, c] float32, the codebook

    def to(self, device: torch.device | str) -> Self:
        """Move the weights and the codebook, and return the autoencoder."""
        self._codes = self._codes.to(device)
        return super().to(device)

    def _latent_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["vq_embed_dim"] or config["latent_channels"])

    def _before_cast(self) -> None:
        self._codes = self._network.quantize.embedding.weight.detach().float().clone()

    def _decoded(self, unscaled: Tensor) -> Tensor:
        codes = self._quantized(unscaled).to(self._network.dtype)
        spatial = codes if self._network.config["norm_type"] == "spatial" else None
        image: Tensor = self._network.decoder(self._network.post_quant_conv(codes), spatial)
        return image

    def _quantized(self, latents: Tensor) -> Tensor:
        """Return the nearest codes [B, c, h, w] float32 of unscaled latents [B, c, h, w], image by image.

        |z - e|^2 - |z|^2 = |e|^2 - 2 z e is minimized: all distances of a batch would need gigabytes.
        """
        squares = self._codes.square().sum(1)  # [K]
        images = []
        with exact_float32(latents.device):
            for latent in latents:
                nearest = (squares - 2 * latent.flatten(1).T @ self._codes.T).argmin(1)  # [h w]
                images.append(self._codes[nearest].T.reshape(latent.shape))
        return torch.stack(images)


class DCAutoencoder(LatentAutoencoder):
    """diffusers' ``AutoencoderDC`` (Chen et al. 2024, arXiv 2410.10733), which divides sides by 32 to 128."""

    diffusers_class = "AutoencoderDC"
    encoded = "latent"
    blocks_setting = "encoder_block_out_channels"


class TinyAutoencoder(LatentAutoencoder):
    """diffusers' ``AutoencoderTiny``: a small network that approximates another autoencoder, with scaled latents."""

    diffusers_class = "AutoencoderTiny"
    blocks_setting = "encoder_block_out_channels"
