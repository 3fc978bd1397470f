"""Networks of other programs: a ``.pt`` of the released code, or a diffusers folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.images import ExactSize, Preparation
from data.plan import latent_spec
from diffusion.process import GaussianDiffusion
from launch.build import LoadedCheckpoint, require_variance
from launch.components import build
from model.autoencoder import Autoencoder
from model.convert import from_diffusers, from_reference, load_reference
from model.dit import DiT
from runtime.protocol import Runtime


def is_foreign(path: Path) -> bool:
    """Whether a path is a file of weights or a folder of diffusers, and no run or checkpoint of ours."""
    return path.is_file() or (path / "transformer").is_dir() or (path / "config.json").is_file()


def read_foreign(path: Path, num_heads: int | None, frequency_shift: int) -> DiT:
    """The network. ValueError for weights that are none; ``frequency_shift`` matters to diffusers' only."""
    return from_reference(load_reference(path), num_heads) if path.is_file() else from_diffusers(path, frequency_shift)


def load_foreign(config: Mapping[str, Any], runtime: Runtime) -> LoadedCheckpoint:
    """A foreign network with the process and autoencoder of the job's config, which ours would carry itself."""
    path = Path(config["checkpoint"])
    model = read_foreign(path, config["foreign"]["num_heads"], config["foreign"]["frequency_shift"])
    process: GaussianDiffusion = build(config["diffusion"])
    require_variance(model, process)
    autoencoder: Autoencoder = build(config["data"]["autoencoder"])
    if autoencoder.channels != model.config.channels:
        raise ValueError(
            f"The weights in {path} are for latents of {model.config.channels} channels, but the autoencoder "
            f"{autoencoder.name} has {autoencoder.channels}; choose another model/autoencoder."
        )
    preparation = Preparation(model.config.latent_size * autoencoder.downscale, ExactSize())
    return LoadedCheckpoint(
        path=path,
        run_dir=path.resolve().parent,
        step=0,
        images_seen=0,
        spec=latent_spec(path.name, model.config.num_classes, autoencoder, preparation, flip=False),
        model=runtime.place(model).eval().requires_grad_(False),
        process=runtime.place(process),
        autoencoder=autoencoder.to(runtime.device),
        class_dropout=0.1,  # both programs train with it
        training_seed=0,
    )
