"""Read networks of other programs: files of the released code, diffusers folders, models of the Hugging Face hub."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from core.remote import is_remote
from data.conditions import ClassLabels
from data.images import ExactSize, Preparation
from data.plan import latent_spec
from diffusion.objective import Objective
from launch.builders.build import LoadedCheckpoint, require_outputs
from launch.builders.components import build, target_of
from launch.builders.diffusers_folder import WEIGHTS, is_diffusers_folder, read_class_names, read_diffusers_folder
from launch.builders.foreign_process import notes_on_process
from launch.builders.hub import fetch_from_hub, may_be_hub_name
from launch.builders.normalization import normalized
from launch.builders.sit import program_of, require_direction, require_dits_objective, require_sits_objective
from launch.builders.weight_files import read_weight_file
from launch.builders.weight_tables import EMA, choose_table
from launch.command.settings import EvaluateSettings, SampleSettings
from model.autoencoder import Autoencoder
from model.network import Network
from model.released import ANCHOR, ROUNDING, Description, describe, from_reference, label_rows
from runtime.protocol import Devices

_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}


@dataclass(frozen=True)
class Facts:
    """Settings that the files of other programs may not state. None: the file's own, or the usual value."""

    num_heads: int | None = None
    num_classes: int | None = None
    frequency_shift: int | None = None
    likely_heads: int | None = None  # hint from the run that starts with the weights, where the file says nothing
    likely_classes: int | None = None  # likewise


@dataclass(frozen=True)
class ForeignNetwork:
    """A network of another program, with sentences on how its file was read."""

    where: str
    path: Path  # its file or folder
    model: Network
    notes: tuple[str, ...]
    arguments: Mapping[str, Any]  # those that its trainer saved
    class_names: tuple[str, ...] = ()

    @property
    def program(self) -> str | None:
        """Return the program that the weights are of, where the file says it."""
        return program_of(self.path, self.arguments)


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


def require_program(network: ForeignNetwork, objective: Objective) -> None:
    """Raise ValueError where the file says that its network is of another program than the objective."""
    require_direction(network.where, network.program, objective)
    require_sits_objective(network.where, network.arguments, objective)


def notes_on_positions(model: Network, where: str) -> list[str]:
    """Return a note for jobs that use the network, where a file's position embedding is not the fixed one."""
    if (drift := describe(model).position_drift) <= ROUNDING:
        return []
    return [f"{where}: its position embedding differs from the fixed one by up to {drift:.2g}; its own is used."]


def load_foreign(config: SampleSettings | EvaluateSettings, runtime: Devices) -> LoadedCheckpoint:
    """Return a foreign network with the process and autoencoder of the job's config, which its file does not have."""
    where, settings = config.checkpoint, config.foreign
    network = read_foreign(where, config.weights, Facts(**settings.plain()))
    model = network.model
    objective: Objective = build(config.diffusion)
    require_program(network, objective)
    require_dits_objective(where, network.program, objective)
    require_outputs(model, objective, of=where)
    said = describe(model)
    _require_null_class(said, where, config)
    autoencoder: Autoencoder = build(config.data.autoencoder)
    channels, latent_size, _ = model.latent_shape
    if autoencoder.channels != channels:
        raise ValueError(
            f"The weights in {where} are for latents of {channels} channels, but the autoencoder "
            f"{autoencoder.name} has {autoencoder.channels}; choose another model/autoencoder."
        )
    of_process = notes_on_process(network.path, network.arguments, objective)
    if runtime.is_main:
        for note in (*network.notes, *notes_on_positions(model, where), *of_process):
            print(f"note: {note}", file=sys.stderr)
    preparation = Preparation(latent_size * autoencoder.downscale, ExactSize())
    autoencoder = normalized(autoencoder, config.data, "the config")
    return LoadedCheckpoint(
        path=Path(where),
        run_dir=Path(where).resolve().parent if Path(where).exists() else Path(),  # never the hub's cache
        step=0,
        images_seen=0,
        spec=latent_spec(Path(where).name, said.num_classes, autoencoder, preparation, flip=False),
        conditions=ClassLabels(said.num_classes),
        model=runtime.place(model).eval(),
        objective=runtime.place(objective),
        autoencoder=autoencoder.to(runtime.device),
        class_dropout=0.1 if said.has_null_class else 0.0,  # the rate of both trainers
        training_seed=0,
        class_names=network.class_names,
    )


def _read_file(path: Path, weights: str, facts: Facts) -> ForeignNetwork:
    if path.stem == WEIGHTS and (path.parent / "config.json").exists():  # written by diffusers, with its config
        return _read_folder(path.parent, weights, facts)
    file = read_weight_file(path)
    table, notes = choose_table(file, path, weights)
    try:
        num_classes, reading = _classes(label_rows(table.tensors), facts, file.arguments.get("num_classes"), path)
        heads = facts.num_heads if facts.num_heads is not None else _likely_heads(table.tensors, facts)
        model = from_reference(table.tensors, heads, num_classes, facts.frequency_shift or 0)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return ForeignNetwork(str(path), path, model, (*notes, *reading), file.arguments)


def _read_folder(path: Path, weights: str, facts: Facts) -> ForeignNetwork:
    if weights != EMA:
        raise ValueError(f"{path} is a diffusers folder with one table of weights, not {weights!r}; leave weights out.")
    shift = 1 if facts.frequency_shift is None else facts.frequency_shift
    model, notes = read_diffusers_folder(path, shift)
    description = describe(model)
    for name in ("num_heads", "num_classes"):
        said, found = getattr(facts, name), getattr(description, name)
        if said is not None and said != found:
            raise ValueError(f"foreign.{name} is {said}, but the config of {path} says {found}; leave it out.")
    return ForeignNetwork(str(path), path, model, tuple(notes), {}, read_class_names(path, description.num_classes))


def _classes(rows: int, facts: Facts, trained: object, path: Path) -> tuple[int, list[str]]:
    """Return the number of classes of a label table, and a sentence where its number of rows is ambiguous.

    A trainer without label dropout has no row for the null class.
    """
    both = f"its label table has {rows} rows: "
    both += f"{rows - 1} classes and the null class, or {rows} classes of a trainer without label dropout"
    possible = (rows - 1, rows) if rows > 1 else (1,)
    if facts.num_classes is not None:
        if facts.num_classes not in possible:
            ways = " or ".join(map(str, possible))
            raise ValueError(f"foreign.num_classes is {facts.num_classes}, but {both}; set it to {ways}.")
        return facts.num_classes, []
    if trained in possible:
        assert isinstance(trained, int)
        return trained, []
    if rows == 1:
        return 1, [f"{path}: its label table has 1 row: one class, and no null class."]
    if facts.likely_classes == rows:
        return rows, [f"{path}: {both}; the second is taken, since this run has {rows} classes."]
    if facts.likely_classes is not None:  # where the run has other classes, its label table is initialized anew
        return rows - 1, []
    return rows - 1, [f"{path}: {both}; the first is taken, and foreign.num_classes={rows} takes the second."]


def _likely_heads(tensors: Mapping[str, Tensor], facts: Facts) -> int | None:
    """Return the run's number of heads, or 1 where it cannot fit the width, which a later check of shapes reports."""
    width = next(iter(tensors[ANCHOR].shape), 0)
    return 1 if facts.likely_heads and width % facts.likely_heads else facts.likely_heads


def _require_null_class(said: Description, where: str, config: SampleSettings | EvaluateSettings) -> None:
    if not said.has_null_class and target_of(config.guidance).needs_null:
        raise ValueError(
            f"{where} has no null class (its label table has {said.num_classes} rows for as many classes), "
            "which guidance needs; use diffusion/guidance=none."
        )
