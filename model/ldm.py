"""Define LDM, the U-Net of latent diffusion (Rombach et al. 2022), by diffusers' UNet2DConditionModel."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from model.flops import weightless
from model.unet import UNet, UNetConfig, double_by_copies, empty_on_default_device, labels_of

_MOST_CONTEXT = 2**14


@dataclass(frozen=True)
class LDMConfig(UNetConfig):
    """All settings that determine an LDM's shape. Raises ValueError where the numbers do not fit together."""

    context_dim: int = 512  # channels of a label's embedding, the one token that transformers attend to
    null_class: bool = True  # whether the label table has a row for dropped labels, its last one

    def __post_init__(self) -> None:
        super().__post_init__()
        require_context(self.context_dim)

    @property
    def label_rows(self) -> int:
        """Return the number of rows of the label table; an unconditional network has one, for every image."""
        return self.num_classes + self.null_class if self.num_classes else 1


class LDM(UNet):
    """A U-Net with transformers, which attend to the latent and to the embedding of a label."""

    config_class = LDMConfig
    config: LDMConfig
    family = "LDM"
    label_table = "label_embedding.weight"
    same_settings = (*UNet.same_settings, "context_dim")

    def __init__(self, config: LDMConfig) -> None:
        super().__init__(config)
        self.label_embedding = nn.Embedding(config.label_rows, config.context_dim)
        self.unet = empty_on_default_device(weightless(lambda: transformer_unet(config, config.context_dim)))
        self.initialize(0)

    @property
    def has_null_class(self) -> bool:
        """Return whether the condition can be dropped: the label table has a row for it, or there are no labels."""
        return self.config.null_class or not self.config.num_classes

    def config_for_classes(self, num_classes: int, null_class: bool) -> LDMConfig:
        """Return the config of the same network for other classes, with or without a null class."""
        return replace(self.config, num_classes=num_classes, null_class=null_class)

    def forward(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction that the objective asks for: [B, outputs_per_channel c, h, w].

        x_t is [B, c, h, w] float, t is [B] int64 or float, and the condition is {"label": [B] int64}, or {} where there
        are no classes. Raises ValueError for latents of another shape than the config's.
        """
        self.require_shape(x_t)
        labels = labels_of(condition, self.config)
        if labels is None:
            labels = torch.zeros_like(t, dtype=torch.int64)
        context = self.label_embedding(labels).unsqueeze(1)  # [B, 1, context_dim]
        output: Tensor = self.unet(x_t, t, context, return_dict=False)[0]
        return output


def transformer_unet(config: UNetConfig, context_dim: int, linear_projection: bool = False) -> UNet2DConditionModel:
    """Return diffusers' U-Net of a config, whose transformers attend to tokens of ``context_dim`` channels.

    ``linear_projection`` says whether they are entered and left by linear maps in place of convolutions of 1x1.
    """
    attends = [level in config.attending_levels for level in range(config.levels)]
    unet = UNet2DConditionModel(
        in_channels=config.channels,
        out_channels=config.out_channels,
        block_out_channels=config.level_channels,
        layers_per_block=config.layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        cross_attention_dim=context_dim,
        attention_head_dim=tuple(map(config.heads_of, config.level_channels)),  # the number of heads, whatever its name
        norm_num_groups=config.num_groups,
        time_embedding_dim=4 * config.width,
        use_linear_projection=linear_projection,
    )
    double_by_copies(unet)
    # Diffusers' features of the timestep are as many as the first level's channels; LDM's are as many as the width.
    unet.time_proj = Timesteps(config.width, flip_sin_to_cos=True, downscale_freq_shift=0)
    unet.time_embedding = TimestepEmbedding(config.width, 4 * config.width)
    return unet


def require_context(context_dim: int) -> None:
    """Raise ValueError where the number of channels of a condition's token is none that a network may have."""
    if not isinstance(context_dim, int) or not 1 <= context_dim <= _MOST_CONTEXT:
        raise ValueError(
            f"model.context_dim is {context_dim!r}, but it must be a whole number from 1 to {_MOST_CONTEXT}."
        )
