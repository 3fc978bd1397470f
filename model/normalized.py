"""Normalize the latents of an autoencoder per channel, to mean 0 and standard deviation 1."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from core.samples import Latents
from model.autoencoder import Autoencoder


class Statistics(NamedTuple):
    """The mean and the standard deviation of unscaled latents, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class NormalizedAutoencoder:
    """An autoencoder whose latents are (z - mean) / std, where z is unscaled; ``mean`` and ``std`` are per channel.

    Moments stay those of the autoencoder, and so do the facts that identify it, ``scale`` and ``shift`` among them.
    Raises ValueError for another number of channels, and for a channel without variance.
    """

    usual_latents: ClassVar[tuple[int, int] | None] = None

    def __init__(self, inner: Autoencoder, mean: Sequence[float], std: Sequence[float]) -> None:
        for name, values in (("latent_mean", mean), ("latent_std", std)):
            if len(values) != inner.channels:
                raise ValueError(
                    f"data.{name} has {len(values)} numbers, but the latents of {inner.name} have {inner.channels} "
                    "channels; give one per channel."
                )
        for channel, value in enumerate(std):
            if not value > 0:
                raise ValueError(
                    f"data.latent_std is {value} in channel {channel}, by which latents cannot be divided; set "
                    "data.normalize=false."
                )
        self._inner, self.statistics = inner, Statistics(tuple(mean), tuple(std))
        self.name, self.revision, self.precision = inner.name, inner.revision, inner.precision
        self.downscale, self.channels, self.image_channels = inner.downscale, inner.channels, inner.image_channels
        self.scale, self.shift = inner.scale, inner.shift
        scale, shift = _per_channel(inner.scale), _per_channel(inner.shift)
        self._mean, self._std = (_per_channel(mean) - shift) * scale, _per_channel(std) * scale  # of scaled latents

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, and return the autoencoder."""
        self._inner.to(device)
        return self

    def moments(self, images: Tensor) -> Tensor:
        """Return the moments of the autoencoder: [B, C, H, W] -> [B, 2c, h, w]."""
        return self._inner.moments(images)

    def draw(self, moments: Tensor, posterior: Tensor, out: Tensor | None = None) -> Tensor:
        """Return normalized latents [B, c, h, w] from moments [B, 2c, h, w] and standard normals [B, c, h, w]."""
        scaled = self._inner.draw(moments, posterior, out)
        return torch.div(scaled - self._mean.to(scaled), self._std.to(scaled), out=out)

    def compiled_draw(self) -> Latents | None:
        """Return None: PyTorch normalizes, in float64."""
        return None

    def decode(self, latent: Tensor) -> Tensor:
        """Decode normalized latents [B, c, h, w] to images [B, C, H, W] float32, nominally in [-1, 1]."""
        latent = latent.float()
        return self._inner.decode(latent * self._std.to(latent) + self._mean.to(latent))


def statistics_of(autoencoder: Autoencoder) -> Statistics | None:
    """Return the statistics by which an autoencoder's latents are normalized, or None."""
    return autoencoder.statistics if isinstance(autoencoder, NormalizedAutoencoder) else None


def _per_channel(values: float | Sequence[float]) -> Tensor:
    """Return one number, or one per channel, as [1, 1 or c, 1, 1] float64."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
