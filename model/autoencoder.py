"""Define the interface of autoencoders between images and latents, and the identity for pixel space."""

from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from core.samples import Latents


class Autoencoder(Protocol):
    """Converts images in [-1, 1] to latents and back.

    ``downscale`` is the ratio of image side to latent side, ``channels`` the number of latent channels and
    ``image_channels`` that of image channels. The diffusion process sees (z - ``shift``) x ``scale``; both are one
    number, or one per channel. ``name``, ``revision`` and ``precision`` (of the network: fp32 or bf16) identify it.
    """

    # (downscale, channels), for use without the weights where the settings do not have both; None: the class has
    # `downscale`, its settings `channels`.
    usual_latents: ClassVar[tuple[int, int] | None]
    name: str
    revision: str
    precision: str
    downscale: int
    channels: int
    image_channels: int
    scale: float | list[float]
    shift: float | list[float]

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, and return the autoencoder."""
        ...

    def moments(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W] float32 in [-1, 1] to [B, 2c, h, w] float32: mean, then log-variance."""
        ...

    def draw(self, moments: Tensor, posterior: Tensor, out: Tensor | None = None) -> Tensor:
        """Return scaled latents x_0 [B, c, h, w] from moments [B, 2c, h, w] and standard normals [B, c, h, w].

        They are written to ``out`` if given, which may be ``posterior``. Each sample's latent depends on that sample
        alone. Several threads may call it at once.
        """
        ...

    def compiled_draw(self) -> Latents | None:
        """Return the compiled function by which `draw` draws from float16 on the CPU, or None where another does."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Decode scaled latents [B, c, h, w] to images [B, C, H, W] float32, nominally in [-1, 1]."""
        ...


class IdentityAutoencoder:
    """The autoencoder of pixel space: the latent is the image. (The paper notes that DiTs apply there unchanged.)"""

    usual_latents: ClassVar[tuple[int, int] | None] = None  # of the image's channels
    name = "identity"
    revision = "1"
    precision = "fp32"
    downscale = 1
    scale: float | list[float] = 1.0
    shift: float | list[float] = 0.0
    log_variance = -30.0  # diffusers' lower clamp; the format of shards needs a value, but `draw` does not use it

    def __init__(self, channels: int) -> None:
        self.channels = self.image_channels = channels

    def to(self, device: torch.device | str) -> Self:
        """Return the autoencoder unchanged: it has no weights."""
        return self

    def moments(self, images: Tensor) -> Tensor:
        """Return images [B, c, h, w] and a constant as [B, 2c, h, w]. Raises ValueError for other channels."""
        if images.shape[1] != self.channels:
            raise ValueError(
                f"The identity autoencoder was configured for {self.channels} channels, but the images have "
                f"{images.shape[1]}; set data.autoencoder.channels={images.shape[1]}."
            )
        return torch.cat([images, torch.full_like(images, self.log_variance)], dim=1)

    def draw(self, moments: Tensor, posterior: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the mean of the moments: [B, 2c, h, w] -> [B, c, h, w]. Nothing is drawn."""
        mean = moments[:, : self.channels]
        return mean.float() if out is None else out.copy_(mean)

    def compiled_draw(self) -> Latents | None:
        """Return None: to copy the mean is no work."""
        return None

    def decode(self, latent: Tensor) -> Tensor:
        """Return the latents [B, c, h, w] as float32: they are the images."""
        return latent.float()
