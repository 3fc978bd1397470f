"""Write a DiT of text as a folder in the layout of diffusers, and read it back bit for bit.

diffusers has no class for such a network: the folder is for this program. Its config is the section of the run, which
is read as that of a checkpoint: only components of this project are built.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from safetensors.torch import save_file

from core.records import validate
from launch.builders.components import build_saved, from_file
from launch.builders.diffusers_folder import TEXT_CLASS, WEIGHTS, read_json, read_network_weights
from launch.builders.named_encoder import NamedEncoder, write_encoder_name
from model.diffusers_weights import scheduler_settings, write_config
from model.family import PipelineParts
from model.flops import weightless
from model.network import Network
from model.released import require_tensors
from model.text_embedding import POOLED, TOKENS

_PIPELINE = "DitscaleTextPipeline"
_NOT_WRITTEN = ("text_encoder", "tokenizer", "vae")
NOTE = (
    "diffusers has no class for this network, so it cannot load the folder; `ditscale sample checkpoint=FOLDER "
    'prompts="..."`, with the run\'s model/autoencoder, and init_from=FOLDER do.'
)


@dataclass(frozen=True)
class _Config:
    """The fields of our ``transformer/config.json``."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: dict[str, Any]
    outputs_per_channel: Annotated[int, Field(ge=1, le=16)]


def is_of_text(network: Network) -> bool:
    """Return whether a network is conditioned on captions."""
    embedded = network.example_inputs(1)[2]
    return TOKENS in embedded or POOLED in embedded


def write_text_folder(
    network: Network, section: Mapping[str, Any], folder: Path, text: NamedEncoder, parts: PipelineParts
) -> None:
    """Write config, weights, scheduler and the text encoder's name. ``section`` is ``model`` in the run's config."""
    inner = folder / "transformer"
    config = {name: value for name, value in section.items() if name != "outputs_per_channel"}
    outputs = network.out_channels // network.latent_shape[0]
    write_config(inner / "config.json", TEXT_CLASS, {"model": config, "outputs_per_channel": outputs})
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()}, inner / f"{WEIGHTS}.safetensors"
    )
    settings = scheduler_settings(parts.betas, parts.prediction)
    write_config(folder / "scheduler" / "scheduler_config.json", "DDIMScheduler", settings)
    listed: dict[str, Any] = {"transformer": ["ditscale", TEXT_CLASS], "scheduler": ["diffusers", "DDIMScheduler"]}
    listed |= {name: [None, None] for name in _NOT_WRITTEN}
    write_config(folder / "model_index.json", _PIPELINE, listed)
    write_encoder_name(folder, text)


def read_text_folder(inner: Path) -> Network:
    """Return the network in a folder that `write_text_folder` wrote, from its ``config.json`` and its weights.

    Raises ValueError, naming the file, for a config that asks for anything but a network of text of this program, and
    for weights that do not fit it.
    """
    path = inner / "config.json"
    content = {name: value for name, value in read_json(path).items() if not name.startswith("_")}
    config = validate(_Config, content, str(path))
    section = from_file(config.model, "model", str(path))
    section["outputs_per_channel"] = config.outputs_per_channel
    shaped: Network = weightless(lambda: build_saved(section, str(path)))
    if not is_of_text(shaped):
        raise ValueError(f"{path} is of a network without text, which no export writes so; give another folder.")
    state = read_network_weights(inner)
    try:
        require_tensors(
            state, {name: tuple(value.shape) for name, value in shaped.state_dict().items()}, "this network"
        )
    except ValueError as error:
        raise ValueError(f"{inner}: {error}") from error
    network: Network = build_saved(section, str(path))
    network.load_state_dict(state)
    return network
