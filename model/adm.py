"""Define ADM, the U-Net of Dhariwal and Nichol (arXiv 2105.05233), by diffusers' UNet2DModel."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from model.flops import weightless
from model.unet import UNet, UNetConfig, double_by_copies, empty_on_default_device, labels_of

LOW_RESOLUTION = "low_resolution"  # part of an upsampler's condition


@dataclass(frozen=True)
class ADMConfig(UNetConfig):
    """All settings that determine an ADM's shape. Raises ValueError where the numbers do not fit together."""

    null_class: bool = True  # whether the label table has a row for dropped labels, its last one
    upscale: int = 1  # more than 1: the network also sees an image of that much smaller a side

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.upscale, int) or self.upscale < 1 or self.latent_size % self.upscale:
            raise ValueError(
                f"model.upscale is {self.upscale!r}, but it must divide the latent size {self.latent_size}; set it to "
                "1 for a network without a low-resolution image."
            )


class ADM(UNet):
    """A U-Net with residual blocks that downsample and upsample, shifted and scaled by timestep and label."""

    config_class = ADMConfig
    config: ADMConfig
    family = "ADM"
    same_settings = (*UNet.same_settings, "upscale")

    def __init__(self, config: ADMConfig) -> None:
        super().__init__(config)
        self.unet = empty_on_default_device(weightless(lambda: _unet_of(config)))
        self.label_table = "unet.class_embedding.weight" if config.num_classes else None
        self.initialize(0)

    @property
    def has_null_class(self) -> bool:
        """Return whether the condition can be dropped: the label table has a row for it, or there is no table."""
        return self.config.null_class or not self.config.num_classes

    def config_for_classes(self, num_classes: int, null_class: bool) -> ADMConfig:
        """Return the config of the same network for other classes, with or without a null class."""
        return replace(self.config, num_classes=num_classes, null_class=null_class)

    def forward(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction that the objective asks for: [B, outputs_per_channel c, h, w].

        x_t is [B, c, h, w] float, t is [B] int64 or float. The condition has {"label": [B] int64}, unless there are no
        classes, and {"low_resolution": [B, c, h/upscale, w/upscale] float} for an upsampler. Raises ValueError for
        latents of another shape than the config's.
        """
        self.require_shape(x_t)
        if self.config.upscale > 1:
            small = nn.functional.interpolate(condition[LOW_RESOLUTION], x_t.shape[2:], mode="bilinear")
            x_t = torch.cat([x_t, small], dim=1)
        output: Tensor = self.unet(x_t, t, labels_of(condition, self.config), return_dict=False)[0]
        return output

    def example_inputs(self, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return zeros of the shapes that the network takes, for ``batch`` images, on its device."""
        x_t, t, condition = super().example_inputs(batch)
        if self.config.upscale > 1:
            factor = self.config.upscale
            condition[LOW_RESOLUTION] = x_t[:, :, ::factor, ::factor].contiguous()
        return x_t, t, condition


def _unet_of(config: ADMConfig) -> UNet2DModel:
    attends = [level in config.attending_levels for level in range(config.levels)]
    unet = UNet2DModel(
        in_channels=config.channels * (1 if config.upscale == 1 else 2),
        out_channels=config.out_channels,
        block_out_channels=config.level_channels,
        layers_per_block=config.layers,
        down_block_types=tuple("AttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attends),
        up_block_types=tuple("AttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(attends)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=1,  # the heads are set below
        norm_num_groups=config.num_groups,
        attn_norm_num_groups=config.num_groups,  # without it, the attention in the middle has no norm
        time_embedding_dim=4 * config.width,
        num_class_embeds=config.num_classes + config.null_class if config.num_classes else None,
    )
    double_by_copies(unet)
    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = config.heads_of(module.query_dim)
    # Diffusers' features of the timestep are as many as the first level's channels; ADM's are as many as the width.
    unet.time_proj = Timesteps(config.width, flip_sin_to_cos=True, downscale_freq_shift=0)
    unet.time_embedding = TimestepEmbedding(config.width, 4 * config.width)
    return unet
