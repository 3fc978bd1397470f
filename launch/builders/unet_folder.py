"""Read a folder of diffusers with the U-Net of Stable Diffusion, without running diffusers."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from core.records import validate
from launch.builders.diffusers_folder import read_json, read_network_weights
from model.network import Network
from model.sd_diffusers import from_unet_folder

Positive = Annotated[int, Field(ge=1, le=2**20)]
Levels = Field(min_length=1, max_length=16)
BlockType = Annotated[str, Field(max_length=64)]


@dataclass
class UNetFolderConfig:
    """The fields of ``unet/config.json`` that decide the network's shape, with diffusers' defaults."""

    sample_size: Positive | None = None
    in_channels: Positive = 4
    out_channels: Positive = 4
    block_out_channels: Annotated[list[Positive], Levels] = field(default_factory=lambda: [320, 640, 1280, 1280])
    down_block_types: Annotated[list[BlockType], Levels] = field(
        default_factory=lambda: [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"]
    )
    up_block_types: Annotated[list[BlockType], Levels] = field(
        default_factory=lambda: ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3]
    )
    layers_per_block: Positive = 2
    norm_num_groups: Positive = 32
    cross_attention_dim: Positive = 1280
    attention_head_dim: Positive | Annotated[list[Positive], Levels] = 8
    use_linear_projection: bool = False
    time_embedding_dim: Positive | None = None


# Settings with which a network computes something that the network here does not have, and its values, which are
# diffusers' defaults too.
_OURS: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "transformer_layers_per_block": 1,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
}
# Settings that change no output: heads of an embedding that is not there, and what matters in training or half
# precision alone.
_WITHOUT_EFFECT = {"addition_embed_type_num_heads", "dropout", "upcast_attention"}
_FOR_EACH_LEVEL = {  # may be lists of one number for each level; here, of the same
    *("sample_size", "layers_per_block", "cross_attention_dim"),
    *("only_cross_attention", "transformer_layers_per_block"),
}


def read_unet_folder(inner: Path) -> Network:
    """Return the U-Net in a folder with ``config.json`` and weights.

    Raises ValueError, naming the file, for the config of a network that computes something else, with the setting, and
    for weights that do not fit.
    """
    config = _read_config(inner / "config.json")
    state = read_network_weights(inner)
    try:
        return from_unet_folder(state, config)
    except ValueError as error:
        raise ValueError(f"{inner}: {error}") from error


def _read_config(path: Path) -> UNetFolderConfig:
    content = {name: _plain(name, value) for name, value in read_json(path).items() if not name.startswith("_")}
    shape = {one.name for one in fields(UNetFolderConfig)}
    for name, value in content.items():
        if name in shape or name in _WITHOUT_EFFECT or (value is None and name not in _OURS):
            continue
        if value != (ours := _OURS.get(name, False)):  # all others are off
            raise ValueError(
                f"{path} has {name!r:.100} {value!r:.100}, but Stable Diffusion's U-Net has {ours!r}; its outputs "
                "would differ here."
            )
    return validate(UNetFolderConfig, {key: content[key] for key in content if key in shape}, str(path))


def _plain(name: str, value: Any) -> Any:
    """Return the one value of a setting that has the same for each level, or the setting as it is."""
    same = name in _FOR_EACH_LEVEL and isinstance(value, list) and value and all(item == value[0] for item in value)
    return value[0] if same else value
