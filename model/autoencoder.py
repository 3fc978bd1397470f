"""Autoencoders between images and latents, behind one interface."""

from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor


class Autoencoder(Protocol):
    """Images in [-1, 1] to latents and back.

    ``downscale`` is the factor between image and latent side, ``channels`` the latent's channels,
    ``image_channels`` the images'. The diffusion
    sees (z - ``shift``) x ``scale``, one number or one per channel. ``name``, ``revision`` and ``precision`` (of
    the network: fp32 or bf16) are its identity.
    """

    usual_latents: ClassVar[tuple[int, int] | None]  # downscale and channels, for whoever has no weights at hand
    name: str
    revision: str
    precision: str
    downscale: int
    channels: int
    image_channels: int
    scale: float | list[float]
    shift: float | list[float]

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; returns itself."""
        ...

    def moments(self, images: Tensor) -> Tensor:
        """[B, C, H, W] float32 in [-1, 1] -> [B, 2c, h, w] float32: mean, then log-variance."""
        ...

    def draw(self, moments: Tensor, posterior: Tensor) -> Tensor:
        """[B, 2c, h, w] moments and [B, c, h, w] standard normals -> [B, c, h, w] scaled latent x_0."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """[B, c, h, w] scaled latent -> [B, C, H, W] float32 image, nominally in [-1, 1]."""
        ...


class IdentityAutoencoder:
    """Pixel space: the latent is the image. (The paper notes that DiTs apply there unchanged.)"""

    usual_latents: ClassVar[tuple[int, int] | None] = None  # those of pixels
    name = "identity"
    revision = "1"
    precision = "fp32"
    downscale = 1
    scale: float | list[float] = 1.0
    shift: float | list[float] = 0.0
    log_variance = -30.0  # diffusers' lower clamp; written to keep the format of the shards, never drawn from

    def __init__(self, channels: int) -> None:
        self.channels = self.image_channels = channels

    def to(self, device: torch.device | str) -> Self:
        """Itself: there are no weights."""
        return self

    def moments(self, images: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, 2c, h, w]: the image itself, and a constant. ValueError for other channels."""
        if images.shape[1] != self.channels:
            raise ValueError(
                f"The identity autoencoder was configured for {self.channels} channels, but the images have "
                f"{images.shape[1]}; set data.autoencoder.channels={images.shape[1]}."
            )
        return torch.cat([images, torch.full_like(images, self.log_variance)], dim=1)

    def draw(self, moments: Tensor, posterior: Tensor) -> Tensor:
        """[B, 2c, h, w] -> [B, c, h, w]: the mean; there is nothing to draw."""
        return moments[:, : self.channels].float()

    def decode(self, latent: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, c, h, w]: itself."""
        return latent.float()
