"""Read networks of other programs: files of the released code, diffusers folders, models of the Hugging Face hub."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.remote import is_remote
from data.conditions import ClassLabels, ConditionSource, Unconditional
from data.images import ExactSize, Preparation
from data.low_resolution import LOW_RESOLUTION, LowResolution
from data.plan import latent_spec
from diffusion.objective import Objective
from launch.builders.build import LoadedCheckpoint, require_outputs
from launch.builders.components import build, target_of
from launch.builders.diffusers_folder import (
    TEXT_CLASS,
    UNET_CLASS,
    WEIGHTS,
    class_of,
    is_diffusers_folder,
    network_folder,
    read_class_names,
    read_diffusers_folder,
)
from launch.builders.directions import require_direction, require_its_objective, require_sits_objective
from launch.builders.foreign_process import notes_on_process
from launch.builders.foreign_text import dropout_of, text_condition, text_named_by
from launch.builders.hub import fetch_from_hub, may_be_hub_name
from launch.builders.normalization import normalized
from launch.builders.text_folder import is_of_text, read_text_folder
from launch.builders.unet_folder import read_unet_folder
from launch.builders.weight_files import read_weight_file
from launch.builders.weight_tables import EMA, choose_table
from launch.command.settings import EvaluateSettings, GeneratingSettings
from model.autoencoder import Autoencoder
from model.dit_families import frequency_shift_of
from model.families import RELEASED_DIT, STABLE_DIFFUSION, family_of, require_fit, require_settings, stated
from model.family import Facts, Family
from model.network import Network
from runtime.protocol import Devices

_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}


@dataclass(frozen=True)
class ForeignNetwork:
    """A network of another program, with sentences on how its file was read."""

    where: str
    path: Path  # its file or folder
    model: Network
    notes: tuple[str, ...]
    arguments: Mapping[str, Any]  # those that its trainer saved
    family: Family
    family_is_certain: bool  # False: the tensors' names are also those of another family
    class_names: tuple[str, ...] = ()

    @property
    def certain_family(self) -> Family | None:
        """Return the family of the weights, where the file tells it."""
        return self.family if self.family_is_certain else None


def is_foreign(where: str) -> bool:
    """Return whether a text names weights of another program, not a run or checkpoint of this one.

    A local path that exists takes precedence over a name of the hub.
    """
    names_file = Path(where).suffix in _SUFFIXES
    if is_remote(where):
        return False
    if _is_folder(Path(where)):
        return is_diffusers_folder(Path(where)) or (names_file and not (Path(where) / "checkpoints").exists())
    return names_file or os.path.lexists(where) or may_be_hub_name(where)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # not a valid file name, such as one of 300 letters
        return False


def read_foreign(where: str, weights: str, facts: Facts) -> ForeignNetwork:
    """Return the network of a file, a folder or a model of the hub. ``weights`` names a table (see `choose_table`).

    Raises ValueError, naming the file, where it does not have such a network's weights, or is ambiguous.
    """
    path, notes = Path(where), list[str]()
    if not os.path.lexists(where) and path.suffix not in _SUFFIXES:
        path = fetch_from_hub(where)
        notes.append(f"{where} is its commit {path.name[:12]} on the Hugging Face hub.")
    network = (_read_folder if _is_folder(path) else _read_file)(path, weights, facts)
    return replace(network, where=where, notes=(*network.notes, *notes))


def require_family(network: ForeignNetwork, objective: Objective) -> None:
    """Raise ValueError where the file says that its network is of another family than the objective is for."""
    require_direction(network.where, network.certain_family, objective)
    require_sits_objective(network.where, network.arguments, objective)


def notes_on_weights(model: Network, where: str) -> list[str]:
    """Return notes for jobs that use the network itself, where it differs from those trained here."""
    return [f"{where}: {note}" for note in model.notes_on_weights()]


def load_foreign(config: GeneratingSettings | EvaluateSettings, runtime: Devices) -> LoadedCheckpoint:
    """Return a foreign network with the process and autoencoder of the job's config, which its file does not have."""
    where, settings = config.checkpoint, config.foreign
    network = read_foreign(where, config.weights, Facts(**settings.plain()))
    model = network.model
    conditions, dropout, of_text = _conditions_of(network, config, runtime)
    objective: Objective = build(config.diffusion)
    require_family(network, objective)
    require_its_objective(where, network.certain_family, objective)
    require_outputs(model, objective, of=where)
    _require_null_class(model, where, config)
    autoencoder: Autoencoder = build(config.data.autoencoder)
    channels, latent_size, _ = model.latent_shape
    if autoencoder.channels != channels:
        raise ValueError(
            f"The weights in {where} are for latents of {channels} channels, but the autoencoder "
            f"{autoencoder.name} has {autoencoder.channels}; choose another model/autoencoder."
        )
    of_process = notes_on_process(network.path, network.arguments, objective)
    if runtime.is_main:
        for note in (*network.notes, *notes_on_weights(model, where), *of_process, *of_text):
            print(f"note: {note}", file=sys.stderr)
    preparation = Preparation(latent_size * autoencoder.downscale, ExactSize())
    autoencoder = normalized(autoencoder, config.data, "the config")
    return LoadedCheckpoint(
        path=Path(where),
        run_dir=Path(where).resolve().parent if Path(where).exists() else Path(),  # never the hub's cache
        step=0,
        images_seen=0,
        spec=latent_spec(Path(where).name, model.num_classes, autoencoder, preparation, flip=False),
        conditions=conditions,
        model=runtime.place(model).eval(),
        objective=runtime.place(objective),
        autoencoder=autoencoder.to(runtime.device),
        class_dropout=dropout,
        training_seed=0,
        class_names=network.class_names,
    )


def _conditions_of(
    network: ForeignNetwork, config: GeneratingSettings | EvaluateSettings, runtime: Devices
) -> tuple[ConditionSource, float, list[str]]:
    """Return the source of a network's conditions, the fraction that training dropped, and sentences on them."""
    model = network.model
    if is_of_text(model):
        named = text_named_by(network.path, network.arguments)
        source, notes = text_condition(network.where, network.path, model, named, config.text_encoder, runtime.place)
        return source, dropout_of(named), notes
    dropout = 0.1 if model.has_null_class else 0.0  # the rate of both trainers
    x_t, _, embedded = model.example_inputs(1)
    if LOW_RESOLUTION in embedded:
        return LowResolution(model.num_classes, x_t.shape[-1] // embedded[LOW_RESOLUTION].shape[-1]), dropout, []
    return ClassLabels(model.num_classes) if model.num_classes else Unconditional(), dropout, []


def _read_file(path: Path, weights: str, facts: Facts) -> ForeignNetwork:
    if path.stem == WEIGHTS and (path.parent / "config.json").exists():  # written by diffusers, with its config
        return _read_folder(path.parent, weights, facts)
    file = read_weight_file(path)
    table, notes = choose_table(file, path, weights)
    try:
        family, is_certain = family_of(table.tensors, facts.family, stated(file.arguments, path.name))
        _require_facts(family, facts)
        network, reading = family.read(table.tensors, replace(facts, trained_classes=file.arguments.get("num_classes")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if is_certain and family is not RELEASED_DIT:
        notes.append(f"{path}: its weights are of the family {family.name}.")
    notes += [f"{path}: {note}" for note in reading]
    return ForeignNetwork(str(path), path, network, tuple(notes), file.arguments, family, is_certain)


def _read_folder(path: Path, weights: str, facts: Facts) -> ForeignNetwork:
    if weights != EMA:
        raise ValueError(f"{path} is a diffusers folder with one table of weights, not {weights!r}; leave weights out.")
    inner = network_folder(path)
    family = STABLE_DIFFUSION if class_of(inner) == UNET_CLASS else RELEASED_DIT
    if facts.family not in (None, family.name):
        raise ValueError(
            f"{path} has weights of the family {family.name}, but foreign.family is {facts.family}; leave it out."
        )
    try:
        _require_facts(family, facts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if family is STABLE_DIFFUSION:
        model, notes = read_unet_folder(inner), list[str]()
    elif class_of(inner) == TEXT_CLASS:
        model, notes = read_text_folder(inner), []
    else:
        model, notes = read_diffusers_folder(path, frequency_shift_of(facts, usual=1))
    for name in ("num_heads", "head_dim", "latent_size", "num_classes"):
        said = getattr(facts, name)
        if said is not None and said != (found := getattr(model.config, name)):
            raise ValueError(f"foreign.{name} is {said}, but the config of {path} says {found}; leave it out.")
    names = read_class_names(path, model.num_classes)
    return ForeignNetwork(str(path), path, model, tuple(notes), {}, family, True, names)


def _require_facts(family: Family, facts: Facts) -> None:
    require_settings(family, facts)
    if facts.like is not None:
        require_fit(family, facts.like)


def _require_null_class(model: Network, where: str, config: GeneratingSettings | EvaluateSettings) -> None:
    if not model.has_null_class and target_of(config.guidance).needs_null:
        raise ValueError(
            f"{where} has no null class (its label table has {model.num_classes} rows for as many classes), "
            "which guidance needs; use diffusion/guidance=none."
        )
