"""Compute features of DINOv2 (Oquab et al. 2023), for the FD-DINOv2 that Stein et al. 2023 propose besides FID."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.reading import DamagedFileError, read_regular, require_regular, sha256_of
from core.records import parse_object, validate
from evaluation.features.network import NetworkFeatures

Size = Annotated[int, Field(ge=1, le=2**16)]


class DINOv2Features(NetworkFeatures):
    """A `FeatureExtractor`: the class token after the last norm of the DINOv2 in a local ``folder``.

    The folder has ``config.json`` and ``model.safetensors``, copied from a model's page on the hub or written by
    ``save_pretrained`` of transformers; nothing is downloaded. ``hash`` depends on both files. Raises ValueError where
    the folder does not hold a whole DINOv2, or transformers is not installed.
    """

    def __init__(
        self,
        folder: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 100,
    ) -> None:
        config, weights = (Path(folder) / name for name in ("config.json", "model.safetensors"))
        try:
            require_regular(config)
            require_regular(weights)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(
                f"There is no {error.filename}; copy config.json and model.safetensors of a DINOv2 from its page on "
                "the hub (facebook/dinov2-large) there, or name another folder by evaluation.features.folder=PATH."
            ) from None
        shape, tensors = _read_config(config), _read_weights(weights)
        hash_ = hashlib.sha256((sha256_of(config) + sha256_of(weights)).encode()).hexdigest()
        backbone = _build(shape, tensors, weights)
        title = f"DINOv2 features (width {shape.hidden_size}, depth {shape.num_hidden_layers})"
        super().__init__(_ClassToken(backbone), title, hash_, image_size, mean, std, batch_size, folder)


class _ClassToken(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        token: Tensor = self.backbone(x).last_hidden_state[:, 0]
        return token


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
