"""Define the U-Net of Stable Diffusion (Rombach et al. 2022), whose transformers attend to the tokens of a caption."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.flops import weightless
from model.ldm import require_context, transformer_unet
from model.text_embedding import MASK, TOKENS
from model.unet import UNet, UNetConfig, empty_on_default_device

_MOST_TOKENS = 2**12


@dataclass(frozen=True)
class SDUNetConfig(UNetConfig):
    """All settings that determine the network's shape. Raises ValueError where the numbers do not fit together."""

    context_dim: int = 768  # D, channels of a caption's token
    context_length: int = 77  # M, tokens of a caption, for which costs are counted; others are accepted
    linear_projection: bool = False  # transformers have linear maps in place of convolutions of 1x1, as in version 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_context(self.context_dim)
        if not isinstance(self.context_length, int) or not 1 <= self.context_length <= _MOST_TOKENS:
            raise ValueError(
                f"model.context_length is {self.context_length!r}, but it must be a whole number from 1 to "
                f"{_MOST_TOKENS}."
            )
        if self.num_classes:
            raise ValueError(
                f"model.num_classes is {self.num_classes}, but Stable Diffusion's U-Net has 0: it is conditioned on "
                "text; use model=ldm4 or ldm8 for classes."
            )


class SDUNet(UNet):
    """A U-Net with transformers, which attend to the latent and to the tokens of a caption.

    It has no null row: the caller drops a condition by the tokens of the empty caption.
    """

    config_class = SDUNetConfig
    config: SDUNetConfig
    family = "SD"
    same_settings = (*UNet.same_settings, "context_dim", "linear_projection")

    def __init__(self, config: SDUNetConfig) -> None:
        super().__init__(config)
        made = weightless(lambda: transformer_unet(config, config.context_dim, config.linear_projection))
        self.unet = empty_on_default_device(made)
        self.initialize(0)

    def forward(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction that the objective asks for: [B, outputs_per_channel c, h, w].

        x_t is [B, c, h, w] float, t is [B] int64 or float, and the condition is {"text": [B, M, D] of any float dtype,
        "text_mask": [B, M] bool}. No output depends on a token where the mask is False, whatever is there, even NaN.
        Raises ValueError for latents of another shape than the config's.
        """
        self.require_shape(x_t)
        mask = condition[MASK]
        tokens = condition[TOKENS].float().where(mask.unsqueeze(2), 0)  # the mask alone adds -10,000 to a score
        output: Tensor = self.unet(x_t, t, tokens, encoder_attention_mask=mask, return_dict=False)[0]
        return output

    def example_inputs(self, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return zeros of the shapes that the network takes, for ``batch`` images, without padding, on its device."""
        x_t, t, _ = super().example_inputs(batch)
        length = self.config.context_length
        tokens = torch.zeros(batch, length, self.config.context_dim, device=x_t.device)
        return x_t, t, {TOKENS: tokens, MASK: torch.ones(batch, length, dtype=torch.bool, device=x_t.device)}
