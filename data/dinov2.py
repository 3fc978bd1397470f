"""Load DINOv2 (Oquab et al. 2023) from a folder as its page on the hub has it, read as untrusted files."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.reading import DamagedFileError, read_regular, require_regular, sha256_of
from core.records import parse_object, validate

Size = Annotated[int, Field(ge=1, le=2**16)]
FILES = ("config.json", "model.safetensors")


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
    config, weights = (Path(folder) / name for name in FILES)
    try:
        require_regular(config)
        require_regular(weights)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"There is no {error.filename}; copy config.json and model.safetensors of a DINOv2 from its page on "
            f"the hub (facebook/dinov2-large) there, or name another folder by {setting}=PATH."
        ) from None
    shape, tensors = _read_config(config), _read_weights(weights)
    hash_ = hashlib.sha256((sha256_of(config) + sha256_of(weights)).encode()).hexdigest()
    backbone = _build(shape, tensors, weights)
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
    try:
        content = parse_object(read_regular(path), str(path))
    except DamagedFileError as error:
        raise ValueError(f"{path} is not the JSON of a model ({error}); copy it again.") from None
    if (kind := content.get("model_type")) != "dinov2":
        raise ValueError(f"{path} is of a {str(kind)[:80]}, not of a dinov2; name the folder of a DINOv2.")
    known = {name: content[name] for name in _Config.__dataclass_fields__ if name in content}
    config = validate(_Config, known, str(path))
    if config.hidden_size % config.num_attention_heads:
        raise DamagedFileError(
            f"{path} is damaged: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}."
        )
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold a readable DINOv2 ({reason}); copy it again.") from None
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise DamagedFileError(f"{path} has {name} of {value.dtype}, but weights are floating-point.")
        if not value.isfinite().all():
            raise DamagedFileError(f"{path} has values that are not finite in {name}; copy it again.")
    return tensors


def _build(config: _Config, tensors: dict[str, Tensor], path: Path) -> Any:
    """Return the backbone with these weights; transformers itself opens no file of the folder."""
    try:
        from transformers import Dinov2Config, Dinov2Model
    except ImportError as error:
        raise ValueError(
            "DINOv2 needs transformers, which is not installed; run `pip install transformers`."
        ) from error
    shape = Dinov2Config(**asdict(config))
    with torch.device("meta"):
        wanted = sum(value.numel() for value in Dinov2Model(shape).state_dict().values())
    if wanted > 2 * (held := sum(value.numel() for value in tensors.values())):
        raise DamagedFileError(
            f"{path} holds {held} numbers, but its config asks for {wanted}; copy both files from one model."
        )
    try:
        with _silent():
            both: Any = Dinov2Model.from_pretrained(
                None,
                config=shape,
                state_dict=tensors,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in one sentence
                dtype=torch.float32,
                attn_implementation="sdpa",
            )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold a readable DINOv2 ({reason}); copy both files again.") from error
    backbone, loaded = both
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(missing)} of the weights of its config, {missing[0]} among them; copy both files from "
            "one model."
        )
    if wrong := sorted(loaded["mismatched_keys"], key=str):
        name, theirs, ours = wrong[0]
        raise ValueError(
            f"{path} has {name} of shape {list(theirs)}, but its config asks for {list(ours)}; copy both files "
            "from one model."
        )
    return backbone


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from printing a table of what it loads."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
