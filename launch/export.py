"""``ditscale export``: write a checkpoint's weights in the format of another program."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.atomic import atomic_file, atomic_folder
from core.progress import ProgressBar
from core.records import validate
from data.manifest import LatentSpec
from diffusion.process import require_gaussian
from launch.builders.components import build, target_of
from launch.builders.foreign import Facts, is_foreign, notes_on_positions, read_foreign
from launch.builders.normalization import saved_normalization
from launch.builders.runs import read_checkpoint
from launch.builders.saved_configs import component
from launch.builders.saved_networks import model_at, objective_at
from launch.builders.sit import SIT, SITS_ARGUMENTS, require_export, sits_arguments
from launch.command.settings import ExportSettings, Program
from launch.jobs import start
from model.convert import to_sit
from model.diffusers_weights import notes_on_pipeline, to_diffusers
from model.network import Network
from model.released import notes_on_reference, to_reference
from train.checkpoint import read_state_file
from train.stores import STATE_FILE


@dataclass(frozen=True)
class Source:
    """A network, with what a diffusers pipeline also needs, where that is known."""

    model: Network
    notes: tuple[str, ...] = ()
    autoencoder: Any = None  # diffusers' network
    class_names: tuple[str, ...] = ()
    sit: Mapping[str, Any] | None = None  # arguments that a file for SiT's program states; None: it is not SiT's
    betas: tuple[float, ...] | None = None  # None: the paper's


def export_job(config: ExportSettings, progress: ProgressBar) -> None:
    """Write ``out``: a ``.pt`` file with the names of the released DiT or SiT, or a folder that diffusers loads."""
    where, out, for_diffusers = config.checkpoint, Path(config.out), config.to is Program.diffusers
    if out.exists():
        raise ValueError(f"{out} exists already; give another out, or remove it.")
    source = _foreign_source(config) if is_foreign(where) else _our_source(where, config.weights, config.to)
    model, notes = source.model, list(source.notes)
    if for_diffusers:
        with atomic_folder(out) as aside:
            to_diffusers(model, aside, source.autoencoder, source.class_names, source.betas)
        notes += notes_on_pipeline(model)
    elif config.to is Program.sit:
        with atomic_file(out) as file:
            torch.save({"ema": to_sit(model), "args": dict(source.sit or {})}, file)
    else:
        with atomic_file(out) as file:
            torch.save(to_reference(model), file)
        notes += notes_on_reference(model)
    print(f"{config.weights} weights of {where} for {config.to}: {out}")
    for note in notes:
        print(f"note: {note}")


def _foreign_source(config: ExportSettings) -> Source:
    network = read_foreign(config.checkpoint, config.weights, Facts(**config.foreign.plain()))
    require_export(config.checkpoint, network.program, for_sit=config.to is Program.sit)
    own = [] if config.to is Program.diffusers else notes_on_positions(network.model, config.checkpoint)
    said = {
        "model": SIT,
        **{key: network.arguments[key] for key in SITS_ARGUMENTS if isinstance(network.arguments.get(key), str)},
    }
    return Source(network.model, (*network.notes, *own), class_names=network.class_names, sit=said)


def _our_source(where: str, weights: str, to: Program) -> Source:
    return read_checkpoint(where, lambda path: _source_at(path, weights, to))


def _source_at(path: Path, weights: str, to: Program) -> Source:
    model, objective = model_at(path, weights), objective_at(path)
    if to is Program.sit:
        return Source(model, sit=sits_arguments(objective))
    require_export(str(path), SIT if objective.reversed_time else None, for_sit=False)
    if to is Program.reference:
        return Source(model)
    state, said_by = read_state_file(path), str(path / STATE_FILE)
    spec = validate(LatentSpec, state["spec"], said_by)
    process = require_gaussian(objective, "to=diffusers")
    if process.parameterization.name != "noise":
        raise ValueError(
            f"to=diffusers writes networks that predict the noise, but {path} was trained with "
            f"diffusion/prediction={process.parameterization.name}; use to=reference, which writes the weights alone."
        )
    normalizes = saved_normalization(state["config"], said_by).normalize
    autoencoder, notes = _autoencoder(component(state["config"], "data.autoencoder", said_by), spec, normalizes)
    names = tuple(state.get("class_names", []))  # earlier versions did not save them
    if not names:
        notes.append("the checkpoint has no class names, so the folder has no id2label.")
    return Source(model, tuple(notes), autoencoder, names, betas=tuple(process.tables.betas.tolist()))


def _autoencoder(section: dict[str, Any], spec: LatentSpec, normalizes: bool) -> tuple[Any, list[str]]:
    """Return diffusers' autoencoder of a checkpoint with the scale that its pipeline needs, or why there is none."""
    if not hasattr(target_of(section), "for_pipeline"):
        return None, ["its latents are images, for which a DiTPipeline has no decoder: open it with vae=None."]
    without = "so the folder has no autoencoder: give yours as DiTPipeline.from_pretrained(FOLDER, vae=...)."
    try:
        autoencoder = build({**section, "precision": "fp32"})
    except ValueError:
        return None, [f"the autoencoder {section['name']} is no longer at {section['pretrained']}, {without}"]
    if autoencoder.revision != spec.autoencoder_revision:
        return None, [f"the autoencoder {autoencoder.name} is not the one that encoded the latents, {without}"]
    if normalizes or isinstance(autoencoder.scale, list) or autoencoder.shift != 0.0:
        return None, [f"a DiTPipeline scales latents by one number, unlike {autoencoder.name} here, {without}"]
    return autoencoder.for_pipeline(), []


if __name__ == "__main__":
    start("export")
