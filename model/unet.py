"""Define what the U-Nets of figure 2 share: their shape, their units, their initial weights. Diffusers has the layers.

A level has residual blocks of one number of channels; each level but the first has half the side of the one before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from model.network import Network

# Limits far above any real model: a config may come from a file, and a model is built before its weights are checked.
_MOST = {
    "latent_size": 2**12,
    "channels": 2**12,
    "num_classes": 2**24,
    "width": 2**14,
    "layers": 2**6,
    "num_groups": 2**12,
    "outputs_per_channel": 2**4,
}
_MOST_LEVELS = 12
_MOST_CHANNELS = 2**16  # of a level
_ROUNDING = 1e-6  # of a multiplier that was computed from channels


@dataclass(frozen=True)
class UNetConfig:
    """The settings that determine a U-Net's shape. Raises ValueError where the numbers do not fit together."""

    latent_size: int  # side of the square latent, or of the image in pixel space
    channels: int  # c, channels of the latent
    num_classes: int  # without the null class; 0: unconditional
    width: int  # channels that the multipliers multiply
    multipliers: tuple[float, ...]  # of the width, for each level
    layers: int  # residual blocks of a level on the way down; the way up has one more
    attention_at: tuple[int, ...]  # the levels with attention, by the factor that they are downsampled by
    head_dim: int | None = None  # channels of an attention head; else num_heads is given
    num_heads: int | None = None  # of each attention
    num_groups: int = 32  # of the group norms
    outputs_per_channel: int = 2  # of the network, for each channel of the latent; the objective determines it

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention_at", tuple(sorted(set(self.attention_at))))
        self._require_numbers()
        self._require_levels()
        if self.latent_size % (factor := 2 ** (self.levels - 1)):
            raise ValueError(
                f"The latent size is {self.latent_size}, which is not a multiple of {factor}, the factor that a U-Net "
                f"of {self.levels} levels downsamples by; choose another size, or fewer model.multipliers."
            )
        for channels in self.level_channels:
            if channels % self.num_groups:
                raise ValueError(
                    f"model.num_groups {self.num_groups} does not divide the {channels} channels of a level; choose a "
                    f"divisor of {math.gcd(*self.level_channels)}."
                )
        self._require_heads()

    def _require_numbers(self) -> None:
        numbers = {name: (getattr(self, name), most) for name, most in _MOST.items()}
        heads = {"head_dim": self.head_dim, "num_heads": self.num_heads}
        numbers |= {name: (value, _MOST_CHANNELS) for name, value in heads.items() if value is not None}
        for name, (value, most) in numbers.items():
            least = 0 if name == "num_classes" else 1
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"model.{name} is {value!r}, but it must be a whole number from {least} to {most}.")

    def _require_levels(self) -> None:
        if not 1 <= len(self.multipliers) <= _MOST_LEVELS:
            raise ValueError(
                f"model.multipliers has {len(self.multipliers)} levels, but a U-Net has 1 to {_MOST_LEVELS}; give one "
                "number for each."
            )
        for multiplier in self.multipliers:
            channels = self.width * multiplier
            if not (1 <= channels <= _MOST_CHANNELS) or abs(channels - round(channels)) > _ROUNDING:
                raise ValueError(
                    f"model.width {self.width} times {multiplier} of model.multipliers is {channels:g}, but the number "
                    f"of a level's channels must be a whole number from 1 to {_MOST_CHANNELS}."
                )
        factors = [2**level for level in range(self.levels)]
        for factor in self.attention_at:
            if factor not in factors:
                raise ValueError(
                    f"model.attention_at has {factor!r}, but the levels of this network are downsampled by "
                    f"{', '.join(map(str, factors))}; choose among these."
                )

    def _require_heads(self) -> None:
        if (self.head_dim is None) == (self.num_heads is None):
            raise ValueError(
                f"model.head_dim is {self.head_dim} and model.num_heads is {self.num_heads}, but exactly one of them "
                "is needed; set the other to null."
            )
        name = "head_dim" if self.num_heads is None else "num_heads"
        attending = [self.level_channels[level] for level in self.attending_levels] + [self.level_channels[-1]]
        for channels in attending:
            if channels % getattr(self, name):
                raise ValueError(
                    f"model.{name} {getattr(self, name)} does not divide the {channels} channels of a level with "
                    f"attention; choose a divisor of {math.gcd(*attending)}."
                )

    def heads_of(self, channels: int) -> int:
        """Return the number of heads of an attention over so many channels."""
        if self.num_heads is not None:
            return self.num_heads
        assert self.head_dim is not None
        return channels // self.head_dim

    @property
    def levels(self) -> int:
        """Return the number of levels."""
        return len(self.multipliers)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Return the number of channels of each level."""
        return tuple(round(self.width * multiplier) for multiplier in self.multipliers)

    @property
    def attending_levels(self) -> list[int]:
        """Return the levels with attention, from 0. The middle of the network, at the last level, always has it."""
        return [level for level in range(self.levels) if 2**level in self.attention_at]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (c, h, w) of a latent."""
        return self.channels, self.latent_size, self.latent_size

    @property
    def out_channels(self) -> int:
        """Return the number of channels of the network's output."""
        return self.channels * self.outputs_per_channel


class UNet(Network):
    """A U-Net whose layers are those of a diffusers network, ``unet``. It is initialized from seed 0."""

    config: UNetConfig
    unet: nn.Module
    family: ClassVar[str]
    same_settings: ClassVar[tuple[str, ...]] = (
        *("channels", "width", "multipliers", "layers", "attention_at"),
        *("head_dim", "num_heads", "num_groups"),
    )

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.latent_shape, self.out_channels = config.latent_shape, config.out_channels

    def units(self) -> Sequence[nn.Module]:
        """Return the residual blocks and the attention or transformer modules, which diffusers calls one by one."""
        return _outermost(self.unet)

    def facts(self) -> dict[str, int | str]:
        """Return the family, the width, the number of levels, and both as the size."""
        width, levels = self.config.width, self.config.levels
        return {"family": self.family, "size": f"{width} channels, {levels} levels", "width": width, "levels": levels}

    def initialize(self, seed: int) -> None:
        """Draw new weights from one generator seeded with ``seed``, by the scheme of the original programs.

        Linear maps and convolutions are uniform within 1 / sqrt(inputs of an output), which is PyTorch's default, and
        label tables standard normal. The last layers of residual blocks, of attention and of the network are zero.
        """
        generator = torch.Generator().manual_seed(seed)
        if next(self.parameters()).is_meta:  # shapes only: nothing to draw
            return
        for module in self.modules():
            _initialize(module, generator)
        for last in (*map(_last_layer, self.units()), cast(nn.Module, self.unet.conv_out)):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def example_inputs(self, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return zeros of the shapes that the network takes, for ``batch`` images, on its device."""
        device = next(self.parameters()).device
        label = torch.zeros(batch, dtype=torch.int64, device=device)
        x_t = torch.zeros(batch, *self.latent_shape, device=device)
        return x_t, torch.zeros_like(label), {"label": label} if self.config.num_classes else {}

    def require_shape(self, x_t: Tensor) -> None:
        """Raise ValueError for latents of another shape than the config's."""
        if x_t.shape[1:] != self.latent_shape:
            raise ValueError(
                f"The latent has shape {tuple(x_t.shape[1:])}, but this model was built for {self.latent_shape}; "
                "build one of that size (latents are square)."
            )


def empty_on_default_device(module: nn.Module) -> nn.Module:
    """Give a module on the meta device memory on the default device, which may be the meta device, without values."""
    return module.to_empty(device=torch.get_default_device())


def double_by_copies(module: nn.Module) -> None:
    """Let all upsampling layers in a module copy each value to four places instead of interpolating.

    The outputs are the same, but XLA computes the gradient of an interpolation on the host.
    """
    for layer in module.modules():
        if isinstance(layer, Upsample2D):
            layer.interpolate = False
            layer.register_forward_pre_hook(_doubled)


def _doubled(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the inputs of a layer, the first of which, [B, C, h, w], is now [B, C, 2h, 2w]."""
    batch, channels, height, width = inputs[0].shape
    image = inputs[0][:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
    return image.reshape(batch, channels, 2 * height, 2 * width), *inputs[1:]


def labels_of(condition: Mapping[str, Tensor], config: UNetConfig) -> Tensor | None:
    """Return the labels [B] int64 of a condition, or None for an unconditional network."""
    return condition["label"] if config.num_classes else None


def _outermost(module: nn.Module) -> list[nn.Module]:
    """Return the units in a module that no other unit contains, in the order of their definition."""
    if isinstance(module, ResnetBlock2D | Attention | Transformer2DModel):
        return [module]
    return [unit for child in module.children() for unit in _outermost(child)]


def _last_layer(unit: nn.Module) -> nn.Module:
    if isinstance(unit, ResnetBlock2D):
        return unit.conv2
    if isinstance(unit, Attention):
        return unit.to_out[0]
    assert isinstance(unit, Transformer2DModel)
    return cast(nn.Module, unit.proj_out)


def _initialize(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the parameters of this module, without those of the modules in it."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        bound = 1 / math.sqrt(module.weight[0].numel())
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
    elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, generator=generator)
    else:
        assert not list(module.parameters(recurse=False)), type(module)
