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
from diffusion.objective import Objective
from diffusion.process import require_gaussian
from launch.builders.components import build, target_of
from launch.builders.directions import SITS_ARGUMENTS, arguments_for, require_export
from launch.builders.foreign import is_foreign, notes_on_weights, read_foreign
from launch.builders.foreign_text import text_named_by
from launch.builders.named_encoder import NamedEncoder, encoder_in_config, write_encoder_name
from launch.builders.normalization import saved_normalization
from launch.builders.runs import read_checkpoint
from launch.builders.saved_configs import component
from launch.builders.saved_networks import model_at, objective_at
from launch.builders.text_folder import NOTE, write_text_folder
from launch.command.settings import ExportSettings
from launch.jobs import start
from model.diffusers_weights import PREDICTION_TYPES
from model.families import RELEASED_DIT, STABLE_DIFFUSION, require_written, written_as_folder, written_for
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
    stated: Mapping[str, Any] = field(default_factory=dict)  # arguments by which a file states what tensors do not tell
    text: NamedEncoder | None = None  # of the captions that the network is conditioned on, where known
    section: Mapping[str, Any] | None = None  # of a DiT of text in its run's config


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
        notes += _write_folder(source, out)
    else:
        with atomic_file(out) as file:
            torch.save(family.content(model, source.stated), file)
        notes += family.notes_on_writing(model)
    notes += [] if source.text is None else [source.text.note()]
    print(f"{config.weights} weights of {where} for {config.to}: {out}")
    for note in notes:
        print(f"note: {note}")


def _write_folder(source: Source, out: Path) -> list[str]:
    """Write a folder of diffusers, or in its layout; return sentences on what it is for."""
    model, text = source.model, source.text
    with atomic_folder(out) as aside:
        if source.section is not None:
            assert text is not None, "a run of text names its encoder"
            write_text_folder(model, source.section, aside, text, source.parts)
            return [NOTE]
        writer = written_as_folder(model)
        writer.write_folder(model, aside, source.parts)
        if text is not None:
            write_encoder_name(aside, text)
    notes = writer.notes_on_folder(model, source.parts)
    if text is not None and not text.attend_to_padding:
        notes.append(f"a {writer.pipeline} attends to padding, which this network never saw, so its outputs differ.")
    return notes


def _foreign_source(config: ExportSettings, target: Family | None) -> Source:
    network = read_foreign(config.checkpoint, config.weights, Facts(**config.foreign.plain()))
    if (found := network.certain_family) is not None:
        require_export(config.checkpoint, found.name, found.reversed_time, target or RELEASED_DIT)
    own = [] if target is None else notes_on_weights(network.model, config.checkpoint)
    stated = {key: network.arguments[key] for key in SITS_ARGUMENTS if isinstance(network.arguments.get(key), str)}
    if target is not None:
        stated["model"] = target.name
    text = text_named_by(network.path, network.arguments)
    stated |= {} if text is None else text.stated()
    return Source(network.model, (*network.notes, *own), PipelineParts(class_names=network.class_names), stated, text)


def _our_source(where: str, weights: str, target: Family | None) -> Source:
    return read_checkpoint(where, lambda path: _source_at(path, weights, target))


def _source_at(path: Path, weights: str, target: Family | None) -> Source:
    model, objective = model_at(path, weights), objective_at(path)
    if target is not None and target.reversed_time:
        return Source(model, stated=arguments_for(target, objective))
    family = str(model.facts()["family"])
    name = "SiT" if family == RELEASED_DIT.name and objective.reversed_time else family
    require_export(str(path), name, objective.reversed_time, target or RELEASED_DIT)
    state, said_by = read_state_file(path), str(path / STATE_FILE)
    text = encoder_in_config(state["config"], said_by)
    if target is not None:
        return Source(model, stated={} if text is None else text.stated(), text=text)
    if text is not None and model.facts()["family"] != STABLE_DIFFUSION.name:
        return _source_of_text(model, objective, text, state["config"], said_by)
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
    return Source(model, tuple(notes), PipelineParts(autoencoder, names, betas, prediction), text=text)


def _source_of_text(
    model: Network, objective: Objective, text: NamedEncoder, config: Mapping[str, Any], said_by: str
) -> Source:
    """Return a DiT of text, whose folder has the names of this program."""
    process = require_gaussian(objective, "to=diffusers")
    if (prediction := process.parameterization.name) not in PREDICTION_TYPES:
        raise ValueError(
            "to=diffusers names what a network predicts, but diffusers has no name for "
            f"diffusion/prediction={prediction}; keep it in our format."
        )
    parts = PipelineParts(betas=tuple(process.tables.betas.tolist()), prediction=prediction)
    return Source(model, parts=parts, text=text, section=component(config, "model", said_by))


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
