"""Convert Stable Diffusion's U-Net from and to folders of diffusers, whose names of tensors are ours, bit for bit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from model.diffusers_weights import scheduler_settings, write_config
from model.flops import weightless
from model.ldm_weights import usual_size
from model.network import Network
from model.released import require_tensors
from model.sd_weights import NAME

if TYPE_CHECKING:
    from model.sd_unet import SDUNet

ANCHOR = "time_embedding.linear_1.weight"  # the tensor that identifies a state dict with diffusers' names of a U-Net
_PREFIX = "unet."  # of our names
# Parts of the pipeline that are not written; the first two are where they are known.
_ABSENT = ("vae", "scheduler", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
_ATTENDS, _PLAIN = "CrossAttn", ""  # what the name of a level's block begins with


class UNetShape(Protocol):
    """The network's shape, as the config next to diffusers' weights states it, with one number for all levels."""

    sample_size: int | None
    in_channels: int
    out_channels: int
    block_out_channels: list[int]
    down_block_types: list[str]
    up_block_types: list[str]
    layers_per_block: int
    norm_num_groups: int
    cross_attention_dim: int
    attention_head_dim: int | list[int]  # heads, whatever the name
    use_linear_projection: bool
    time_embedding_dim: int | None


def from_unet_folder(state: Mapping[str, Tensor], shape: UNetShape) -> "SDUNet":
    """Return the network with diffusers' weights, of the shape that the config next to them states.

    Raises ValueError for a shape that this network does not have, and naming the first three tensors that are missing,
    unknown or of another shape.
    """
    from model.sd_unet import SDUNet, SDUNetConfig  # imported late, since diffusers takes seconds

    arguments = _arguments(shape)
    try:
        config = SDUNetConfig(**arguments)
    except ValueError as error:
        raise ValueError(f"This is not {NAME}: {error}") from error
    expected = weightless(lambda: SDUNet(config)).state_dict()
    require_tensors(state, {_their_name(name): tuple(value.shape) for name, value in expected.items()}, NAME)
    model = SDUNet(config)
    model.load_state_dict({name: state[_their_name(name)] for name in expected})
    return model


def to_unet_folder(
    network: Network,
    folder: Path,
    autoencoder: Any = None,
    betas: Sequence[float] | None = None,
    prediction: str = "noise",
) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained`` opens, given a text encoder and its tokenizer.

    Without an ``autoencoder`` (of diffusers, such as ``AutoencoderKL``), or without ``betas``, those of the process of
    the weights, that call needs a ``vae`` or a ``scheduler`` too. ``prediction`` is ``noise`` or ``v``.
    Raises ValueError for a network that diffusers cannot express.
    """
    from diffusers import UNet2DConditionModel

    model = _require_there(network)
    theirs: Any = weightless(lambda: UNet2DConditionModel(**_settings(model)))
    theirs.load_state_dict({_their_name(name): value for name, value in model.state_dict().items()}, assign=True)
    theirs.save_pretrained(Path(folder) / "unet")
    parts: dict[str, Any] = {"unet": ["diffusers", "UNet2DConditionModel"]}
    parts |= {name: [None, None] for name in _ABSENT}
    if autoencoder is not None:
        autoencoder.save_pretrained(Path(folder) / "vae")
        parts["vae"] = ["diffusers", type(autoencoder).__name__]
    if betas is not None:
        # The pipeline itself corrects an offset of 0, with a warning; both settings are Stable Diffusion's own.
        settings = scheduler_settings(betas, prediction) | {"steps_offset": 1, "set_alpha_to_one": False}
        write_config(Path(folder) / "scheduler" / "scheduler_config.json", "DDIMScheduler", settings)
        parts["scheduler"] = ["diffusers", "DDIMScheduler"]
    content = {"requires_safety_checker": False, **parts}
    write_config(Path(folder) / "model_index.json", "StableDiffusionPipeline", content)


def _their_name(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _arguments(shape: UNetShape) -> dict[str, Any]:
    """Return the arguments of `SDUNetConfig`. Raises ValueError where the network here has no such shape."""
    channels, levels = shape.block_out_channels, len(shape.block_out_channels)
    if shape.out_channels % shape.in_channels:
        raise ValueError(
            f"Its config has {shape.in_channels} input and {shape.out_channels} output channels, but the network here "
            "has one or more outputs for each input; networks that see more than the noisy latent are not read."
        )
    attends = [name.startswith(_ATTENDS) for name in shape.down_block_types]
    down, up = _block_types(attends)
    for name, found, ours in (("down", shape.down_block_types, down), ("up", shape.up_block_types, up)):
        if found != ours or len(found) != levels:
            raise ValueError(
                f"Its config has {name}_block_types {found} for {levels} levels, but the network here would have "
                f"{ours}; its outputs would differ here."
            )
    if shape.time_embedding_dim not in (None, 4 * channels[0]):
        raise ValueError(
            f"Its config has time_embedding_dim {shape.time_embedding_dim}, but the network here has "
            f"{4 * channels[0]}, 4 for each channel of the first level; its outputs would differ here."
        )
    return {
        "latent_size": usual_size(levels) if shape.sample_size is None else shape.sample_size,
        "channels": shape.in_channels,
        "num_classes": 0,
        "width": channels[0],
        "multipliers": tuple(count / channels[0] for count in channels),
        "layers": shape.layers_per_block,
        "attention_at": tuple(2**level for level, here in enumerate(attends) if here),
        **_heads(shape.attention_head_dim, channels),
        "num_groups": shape.norm_num_groups,
        "outputs_per_channel": shape.out_channels // shape.in_channels,
        "context_dim": shape.cross_attention_dim,
        "linear_projection": shape.use_linear_projection,
    }


def _heads(found: int | list[int], channels: list[int]) -> dict[str, int]:
    """Return the heads as a number for all levels, or by the channels of a head."""
    heads = [found] * len(channels) if isinstance(found, int) else found
    if len(set(heads)) == 1 and len(heads) == len(channels):
        return {"num_heads": heads[0]}
    sizes = {count / number for count, number in zip(channels, heads, strict=False)}
    if len(sizes) == 1 and len(heads) == len(channels) and (size := sizes.pop()).is_integer():
        return {"head_dim": int(size)}
    raise ValueError(
        f"Its config has attention_head_dim {found}, the heads of the levels, but the network here has one number of "
        f"heads, or of channels in a head, for all {len(channels)} levels."
    )


def _block_types(attends: Sequence[bool]) -> tuple[list[str], list[str]]:
    """Return diffusers' classes of the blocks on the way down and up, for levels with transformers or without."""
    names = [_ATTENDS if here else _PLAIN for here in attends]
    return [f"{name}DownBlock2D" for name in names], [f"{name}UpBlock2D" for name in reversed(names)]


def _settings(model: "SDUNet") -> dict[str, Any]:
    """Return the arguments of diffusers' class."""
    config = model.config
    down, up = _block_types([level in config.attending_levels for level in range(config.levels)])
    heads = config.num_heads
    return {
        "sample_size": config.latent_size,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.level_channels),
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": config.layers,
        "norm_num_groups": config.num_groups,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": list(map(config.heads_of, config.level_channels)) if heads is None else heads,
        "use_linear_projection": config.linear_projection,
    }


def _require_there(network: Network) -> "SDUNet":
    from model.sd_unet import SDUNet

    assert isinstance(network, SDUNet), "the family fits"
    if network.config.level_channels[0] != network.config.width:
        raise ValueError(
            f"diffusers' U-Net has as many features of the timestep as channels at the first level, "
            f"{network.config.level_channels[0]}, but the model has model.width {network.config.width}; keep it in our "
            "format."
        )
    return network
