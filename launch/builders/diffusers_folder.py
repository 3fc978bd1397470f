"""Read a folder that diffusers wrote, a pipeline or its network alone, without running diffusers.

Here is what all networks share, and the config of a DiT; `launch.builders.unet_folder` has that of a U-Net.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from core.names import plain_name
from core.reading import DamagedFileError, is_absent, read_regular
from core.records import parse_object, validate
from launch.builders.hub import in_hub_cache, require_whole
from launch.builders.weight_files import read_weight_file
from launch.builders.weight_tables import require_numbers
from model.diffusers_weights import from_diffusers
from model.network import Network

WEIGHTS = "diffusion_pytorch_model"
UNET_CLASS = "UNet2DConditionModel"
TEXT_CLASS = "DitscaleTextTransformer"  # ours: diffusers has no class for it; see `launch.builders.text_folder`
_SHARDS = f"{WEIGHTS}.safetensors.index.json"
PARTS = ("transformer", "unet")  # folders of a pipeline's network
_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the older name of the same network
_EPSILON = 1e-6  # of every layer norm in the released code and in this program
_LARGEST_SIDE = 4096  # of a latent; bounded here, since the weights do not determine it

Positive = Annotated[int, Field(ge=1, le=2**20)]


@dataclass
class TransformerConfig:
    """The fields of ``transformer/config.json`` that decide outputs, with diffusers' defaults."""

    sample_size: Annotated[int, Field(ge=1, le=_LARGEST_SIDE)] = 32
    num_attention_heads: Positive = 16
    attention_head_dim: Positive = 72
    in_channels: Positive = 4
    out_channels: Positive | None = None
    num_layers: Positive = 28
    patch_size: Positive = 2
    num_embeds_ada_norm: Positive = 1000
    norm_eps: float = 1e-5
    activation_fn: str = "gelu-approximate"
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    attention_bias: bool = True


def is_diffusers_folder(path: Path) -> bool:
    """Return whether the names in a folder are those of a diffusers folder."""
    names = (*PARTS, "config.json", "model_index.json", f"{WEIGHTS}.safetensors", _SHARDS)
    return path.is_dir() and any((path / name).exists() for name in names)


def network_folder(folder: Path) -> Path:
    """Return the folder with the config and the weights of a pipeline's network, or of a network alone."""
    return next((folder / part for part in PARTS if (folder / part).is_dir()), folder)


def class_of(inner: Path) -> str:
    """Return the class of diffusers that a network's folder has. Raises ValueError where it cannot be read."""
    path = inner / "config.json"
    name = _content_of(path).get("_class_name", _CLASSES[0])
    if name not in (*_CLASSES, UNET_CLASS, TEXT_CLASS):
        raise ValueError(
            f"{path} is of a {str(name)[:100]}, but only a {_CLASSES[0]} or a {UNET_CLASS} can be read; give another "
            "folder."
        )
    return str(name)


def read_diffusers_folder(folder: Path, frequency_shift: int = 1) -> tuple[Network, list[str]]:
    """Return the network of a ``DiTPipeline`` or transformer folder, and sentences on what is computed differently.

    The default computes what diffusers computes; ``frequency_shift`` 0 is right for weights that were trained
    by the released code, such as the published ones. Raises ValueError, naming the file, for any other folder.
    """
    inner = network_folder(folder)
    config = _read_config(inner / "config.json")
    state = read_network_weights(inner)
    try:
        model = from_diffusers(state, config, frequency_shift)
    except ValueError as error:
        raise ValueError(f"{inner}: {error}") from error
    notes = []
    if config.norm_eps != _EPSILON:
        notes.append(
            f"{inner}: its config has norm_eps {config.norm_eps:g}, but {_EPSILON:g} is used, as in the released code."
        )
    return model, notes


def read_class_names(folder: Path, num_classes: int) -> tuple[str, ...]:
    """Return the names of a pipeline's classes in the order of their numbers, or () where a class has no name."""
    try:
        named = read_json(folder / "model_index.json").get("id2label")
    except OSError as error:
        if is_absent(error):
            return ()
        raise
    listed = [named.get(str(number)) for number in range(num_classes)] if isinstance(named, dict) else []
    names = tuple(name for name in listed if isinstance(name, str))
    return names if len(names) == len(listed) else ()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a diffusers folder. Raises OSError as `open` does, and ValueError for bad content."""
    require_whole(path)
    return parse_object(read_regular(path), str(path))


def _content_of(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except OSError as error:
        if is_absent(error):
            raise ValueError(
                f"{path.parent} is not the folder of a diffusers DiT or U-Net: it has no config.json."
            ) from None
        raise


def _read_config(path: Path) -> TransformerConfig:
    content = _content_of(path)
    known = TransformerConfig.__dataclass_fields__
    config = validate(TransformerConfig, {key: content[key] for key in content if key in known}, str(path))
    for name in ("activation_fn", "norm_type", "norm_elementwise_affine", "attention_bias"):
        found, ours = getattr(config, name), known[name].default
        if found != ours:
            raise ValueError(f"{path} has {name} {found!r}, but a DiT has {ours!r}; its outputs would differ here.")
    return config


def read_network_weights(inner: Path) -> dict[str, Tensor]:
    """Read the tensors of a network's folder: one safetensors file, several with an index, or an older ``.bin``.

    Raises ValueError, naming the file, where there are none, and for tensors that are not finite numbers.
    """
    state = _read_weights(inner)
    require_numbers(state, inner)
    return state


def _read_weights(inner: Path) -> dict[str, Tensor]:
    if (inner / f"{WEIGHTS}.safetensors").exists():
        return _tensors(inner / f"{WEIGHTS}.safetensors")
    if (inner / _SHARDS).exists():
        return _read_shards(inner)
    pickled = inner / f"{WEIGHTS}.bin"
    if pickled.exists() and not in_hub_cache(pickled):
        return _tensors(pickled)
    found = ", ".join(sorted(path.name for path in inner.iterdir() if path.name != "config.json")[:3]) or "nothing else"
    raise ValueError(
        f"{inner} holds no network of diffusers in safetensors: it has {found}, but no {WEIGHTS}.safetensors; save it "
        "again by save_pretrained."
    )


def _read_shards(inner: Path) -> dict[str, Tensor]:
    places = read_json(inner / _SHARDS).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise DamagedFileError(f"{inner / _SHARDS} is damaged: it has no weight_map.")
    state: dict[str, Tensor] = {}
    for file_name in sorted({plain_name(name, str(inner / _SHARDS)) for name in places.values()}):
        state |= _tensors(inner / file_name)
    absent = [name for name in places if name not in state]
    if absent:
        raise DamagedFileError(f"{inner / _SHARDS} names {absent[0]}, but none of its files has that tensor.")
    return state


def _tensors(path: Path) -> dict[str, Tensor]:
    require_whole(path)
    return {str(name): value for name, value in read_weight_file(path).content.items() if isinstance(value, Tensor)}
