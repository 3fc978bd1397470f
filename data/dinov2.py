"""Load DINOv2 (Oquab et al. 2023) from a folder as its page on the hub has it, read as untrusted files."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from torch import nn

from core.reading import sha256_of
from data.pretrained import (
    CONFIG,
    WEIGHTS,
    built,
    read_config,
    read_weights,
    require_files,
    require_heads,
    transformers_for,
)

Size = Annotated[int, Field(ge=1, le=2**16)]
FILES = (CONFIG, WEIGHTS)
_KINDS = {"dinov2": None}


class DINOv2(NamedTuple):
    """A DINOv2 of transformers, in float32, with facts on it."""

    backbone: nn.Module
    width: int
    depth: int
    patch_size: int  # pixels
    hash: str  # of both files


def load_dinov2(folder: Path | str, setting: str) -> DINOv2:
    """Return the DINOv2 in a local folder, which has ``config.json`` and ``model.safetensors``.

    Raises ValueError where the folder does not hold a whole DINOv2, naming the ``setting`` that gave it, or where
    transformers is not installed.
    """
    config, *weights = require_files(
        folder,
        "DINOv2",
        "copy config.json and model.safetensors of a DINOv2 from its page on the hub (facebook/dinov2-large) there, or "
        f"name another folder by {setting}=PATH.",
    )
    shape, tensors = _read_config(config), read_weights(weights, "DINOv2")
    hash_ = hashlib.sha256("".join(map(sha256_of, (config, *weights))).encode()).hexdigest()
    backbone = built(*_dinov2(shape), tensors, weights[0], "DINOv2", attn_implementation="sdpa")
    return DINOv2(backbone, shape.hidden_size, shape.num_hidden_layers, shape.patch_size, hash_)


class Shape(NamedTuple):
    """The numbers of a DINOv2 that decide the shape of its features."""

    width: int
    patch_size: int  # pixels


def shape_of(folder: Path | str) -> Shape:
    """Return the shape in ``config.json`` of a folder, without reading weights. Raises as `load_dinov2` and OSError."""
    config = _read_config(Path(folder) / FILES[0])
    return Shape(config.hidden_size, config.patch_size)


@dataclass(frozen=True)
class _Config:
    """The fields of ``config.json`` that determine features; no others are used."""

    hidden_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_attention_heads: Size
    mlp_ratio: Annotated[int, Field(ge=1, le=100)]
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)]
    image_size: Size
    patch_size: Size
    num_channels: Literal[3]
    qkv_bias: bool
    layerscale_value: Annotated[float, Field(ge=-1e6, le=1e6)]
    use_swiglu_ffn: bool
    use_mask_token: bool = True  # missing in folders of earlier versions of transformers


def _read_config(path: Path) -> _Config:
    config = read_config(path, _Config, _KINDS, "DINOv2")
    require_heads(path, config.hidden_size, config.num_attention_heads)
    return config


def _dinov2(shape: _Config) -> tuple[Any, Any]:
    """Return the class of the backbone, and its config."""
    transformers = transformers_for("DINOv2")
    return transformers.Dinov2Model, transformers.Dinov2Config(**asdict(shape))
