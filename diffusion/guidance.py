"""Guidance wraps a denoiser and is itself one."""

from typing import Literal

import torch
from torch import Tensor

from diffusion.protocol import Denoiser


def unguided(denoiser: Denoiser, num_classes: int, latent_channels: int) -> Denoiser:
    """No guidance: the denoiser itself, at half the cost of scale 1."""
    return denoiser


class ClassifierFreeGuidance:
    """Classifier-free guidance (paper, section 3.1): eps = eps_null + scale (eps_label - eps_null).

    ``channels`` is how many of the noise prediction's channels are guided: "all", or 3 as in the released
    code, whose published results guide three of four latent channels. Variance logits are the conditional
    ones. Both halves go through the network in one batch.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        num_classes: int,
        latent_channels: int,
        scale: float = 1.0,
        channels: int | Literal["all"] = "all",
    ) -> None:
        if scale < 0:
            raise ValueError(f"guidance.scale is {scale}, but it must be at least 0; 1 means no guidance.")
        guided = latent_channels if channels == "all" else channels
        if not 1 <= guided <= latent_channels:
            raise ValueError(
                f"guidance.channels is {channels}, but the latent has {latent_channels} channels; "
                "use a smaller number or 'all'."
            )
        self.denoiser = denoiser
        self.null_class = num_classes
        self.scale = scale
        self.num_guided = guided

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """[B, c, h, w], [B], [B] int64 -> [B, 2c or c, h, w], as the denoiser's."""
        null = torch.full_like(label, self.null_class)
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([label, null]))
        conditional, unconditional = both.float().chunk(2)
        guided = torch.lerp(unconditional[:, : self.num_guided], conditional[:, : self.num_guided], self.scale)
        return torch.cat([guided, conditional[:, self.num_guided :]], dim=1)
