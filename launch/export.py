"""``ditscale export``: write a checkpoint's weights in the format of another program."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.atomic import atomic_file, atomic_folder
from core.progress import ProgressBar
from core.records import validate
from data.manifest import LatentSpec
from diffusion.process import require_gaussian
from launch.builders.components import build, target_of
from launch.builders.directions import SITS_ARGUMENTS, arguments_for, require_export
from launch.builders.foreign import is_foreign, notes_on_weights, read_foreign
from launch.builders.normalization import saved_normalization
from launch.builders.runs import read_checkpoint
from launch.builders.saved_configs import component
from launch.builders.saved_networks import model_at, objective_at
from launch.command.settings import ExportSettings
from launch.jobs import start
from model.families import RELEASED_DIT, require_written, written_as_folder, written_for
from model.family import Facts, Family, PipelineParts
from model.network import Network
from train.checkpoint import read_state_file
from train.stores import STATE_FILE


@dataclass(frozen=True)
class Source:
    """A network, with what a diffusers pipeline also needs, where that is known."""

    model: Network
    notes: tuple[str, ...] = ()
    parts: PipelineParts = field(default_factory=PipelineParts)
    stated: Mapping[str, Any] = field(default_factory=dict)  # arguments by which a file states its family


def export_job(config: ExportSettings, progress: ProgressBar) -> None:
    """Write ``out``: a ``.pt`` file of another program, or a folder that diffusers loads."""
    where, out = config.checkpoint, Path(config.out)
    if out.exists():
        raise ValueError(f"{out} exists already; give another out, or remove it.")
    family = written_for(config.to)
    source = _foreign_source(config, family) if is_foreign(where) else _our_source(where, config.weights, family)
    model, notes = source.model, list(source.notes)
    require_written(config.to, model, where)
    if family is None:
        writer = written_as_folder(model)
        with atomic_folder(out) as aside:
            writer.write_folder(model, aside, source.parts)
        notes += writer.notes_on_folder(model, source.parts)
    else:
        with atomic_file(out) as file:
            torch.save(family.content(model, source.stated), file)
        notes += family.notes_on_writing(model)
    print(f"{config.weights} weights of {where} for {config.to}: {out}")
    for note in notes:
        print(f"note: {note}")


def _foreign_source(config: ExportSettings, target: Family | None) -> Source:
    network = read_foreign(config.checkpoint, config.weights, Facts(**config.foreign.plain()))
    if (found := network.certain_family) is not None:
        require_export(config.checkpoint, found.name, found.reversed_time, target or RELEASED_DIT)
    own = [] if target is None else notes_on_weights(network.model, config.checkpoint)
    stated = {key: network.arguments[key] for key in SITS_ARGUMENTS if isinstance(network.arguments.get(key), str)}
    if target is not None:
        stated["model"] = target.name
    return Source(network.model, (*network.notes, *own), PipelineParts(class_names=network.class_names), stated)


def _our_source(where: str, weights: str, target: Family | None) -> Source:
    return read_checkpoint(where, lambda path: _source_at(path, weights, target))


def _source_at(path: Path, weights: str, target: Family | None) -> Source:
    model, objective = model_at(path, weights), objective_at(path)
    if target is not None and target.reversed_time:
        return Source(model, stated=arguments_for(target, objective))
    family = str(model.facts()["family"])
    name = "SiT" if family == RELEASED_DIT.name and objective.reversed_time else family
    require_export(str(path), name, objective.reversed_time, target or RELEASED_DIT)
    if target is not None:
        return Source(model)
    state, said_by = read_state_file(path), str(path / STATE_FILE)
    spec = validate(LatentSpec, state["spec"], said_by)
    process, writer = require_gaussian(objective, "to=diffusers"), written_as_folder(model)
    prediction = process.parameterization.name
    if prediction not in writer.folder_predictions:
        possible = " or ".join("the noise" if name == "noise" else name for name in writer.folder_predictions)
        raise ValueError(
            f"to=diffusers writes networks that predict {possible}, but {path} was trained with "
            f"diffusion/prediction={prediction}; use to={writer.program}, which writes the weights alone."
        )
    normalizes = saved_normalization(state["config"], said_by).normalize
    section = component(state["config"], "data.autoencoder", said_by)
    autoencoder, notes = _autoencoder(section, spec, normalizes, writer.pipeline)
    names = tuple(state.get("class_names", []))  # earlier versions did not save them
    if not names and model.num_classes:
        notes.append("the checkpoint has no class names, so the folder has no id2label.")
    betas = tuple(process.tables.betas.tolist())
    return Source(model, tuple(notes), PipelineParts(autoencoder, names, betas, prediction))


def _autoencoder(section: dict[str, Any], spec: LatentSpec, normalizes: bool, pipeline: str) -> tuple[Any, list[str]]:
    """Return diffusers' autoencoder of a checkpoint with the scale that its pipeline needs, or why there is none."""
    if not hasattr(target_of(section), "for_pipeline"):
        return None, [f"its latents are images, for which a {pipeline} has no decoder: open it with vae=None."]
    without = f"so the folder has no autoencoder: give yours as {pipeline}.from_pretrained(FOLDER, vae=...)."
    try:
        autoencoder = build({**section, "precision": "fp32"})
    except ValueError:
        return None, [f"the autoencoder {section['name']} is no longer at {section['pretrained']}, {without}"]
    if autoencoder.revision != spec.autoencoder_revision:
        return None, [f"the autoencoder {autoencoder.name} is not the one that encoded the latents, {without}"]
    if normalizes or isinstance(autoencoder.scale, list) or autoencoder.shift != 0.0:
        return None, [f"a {pipeline} scales latents by one number, unlike {autoencoder.name} here, {without}"]
    return autoencoder.for_pipeline(), []


if __name__ == "__main__":
    start("export")
