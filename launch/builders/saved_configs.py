"""Read the config in a checkpoint or a dump: typed settings and known components, never an interpolation."""

import typing
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from core.fields import components
from launch.builders.components import from_file, plain_value
from launch.command.check import check_type
from launch.command.settings import TrainSettings

# Components that a replay builds from a dump's config: all that determine the step's numbers, and the runtime.
REPLAYED = frozenset({*components(TrainSettings), "runtime", "text_encoder"})

# Sections that earlier versions did not write, with the values that they implied.
EARLIER: dict[str, Any] = {
    "condition": {"_target_": "data.conditions.ClassLabels", "_partial_": True},
    "shape_name": "",
    "alignment": {"_target_": "train.alignment.unaligned"},
    "generator": "numpy",
    "evaluation": {"likelihood_steps": 100},
    "data": {"normalize": False, "latent_mean": None, "latent_std": None, "split": None},
    "model": {
        "block": {
            "norm": {"_target_": "model.norms.layer_norm", "_partial_": True},
            "mlp": {"_target_": "model.mlp.GeluMlp", "_partial_": True},
        }
    },
}
# The same for the sections of objectives, by the name of the class then, which may have moved since.
_EARLIER_GAUSSIAN = {
    "prediction": {"_target_": "diffusion.predictions.PredictNoise"},
    "weighting": {"_target_": "diffusion.weightings.Unweighted"},
}
_EARLIER_FLOW = {
    "_target_": "diffusion.flow.Flow",
    "path": {"_target_": "diffusion.paths.LinearPath"},
    "prediction": {"_target_": "diffusion.predictions.PredictVelocity"},
    "weighting": {"_target_": "diffusion.weightings.Unweighted"},
    "times": {"_target_": "diffusion.times.UniformTimes"},
    "shift": 1.0,
    "direction_weight": 0.0,
    "reversed_time": False,
    "outputs_per_channel": 1,
}


def as_now(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training config of any version in the form that this version writes.

    Earlier versions wrote ``model.learn_sigma``, which had to fit the objective; now the objective determines it.
    """
    now = _filled(config, EARLIER)
    if isinstance(model := now.get("model"), Mapping) and isinstance(model.get("learn_sigma"), bool):
        now["model"] = {key: value for key, value in model.items() if key != "learn_sigma"}
    if isinstance(model := now.get("model"), Mapping) and model.get("_target_") == "model.dit.DiT":
        now["model"] = {"position_table": "fixed", "residual": "fp32", **model}
    if isinstance(objective := now.get("diffusion"), Mapping):
        now["diffusion"] = _objective_as_now(objective)
    return now


def _objective_as_now(section: Mapping[str, Any]) -> dict[str, Any]:
    if section.get("_target_") == "diffusion.flow.StraightFlow":  # had no settings
        return {**section, **_EARLIER_FLOW}
    if section.get("_target_") == "diffusion.process.GaussianDiffusion":
        return {**_EARLIER_GAUSSIAN, **section}
    return dict(section)


def _filled(config: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with missing values filled in from ``earlier``, in the sections that the config has."""
    whole = dict(config)
    for key, inner in earlier.items():
        if not isinstance(inner, Mapping) or "_target_" in inner:
            whole.setdefault(key, inner)
        elif isinstance(config.get(key), Mapping):  # absent for a network without blocks
            whole[key] = _filled(config[key], inner)
    return whole


def setting(config: Mapping[str, Any], name: str, said_by: str) -> Any:
    """Return one scalar of a training config, such as ``batch_size``, checked against `TrainSettings`.

    Raises ValueError, naming the file, where it is missing or of another type.
    """
    return setting_of(config, TrainSettings, name, name, said_by)


def setting_of(section: Mapping[str, Any], schema: type, name: str, place: str, said_by: str) -> Any:
    """Return one scalar of a section, checked against the class of its settings; raise as `setting` does."""
    return _setting(section, name, typing.get_type_hints(schema)[name], place, said_by)


def component(config: Mapping[str, Any], place: str, said_by: str) -> dict[str, Any]:
    """Return the section of a component, such as ``data.autoencoder``. Raises ValueError; see `from_file`."""
    section: Any = as_now(config)
    for key in place.split("."):
        section = section.get(key) if isinstance(section, Mapping) else None
    return from_file(section, place, said_by)


def whole_config(config: Mapping[str, Any], said_by: str, built: Collection[str] = REPLAYED) -> dict[str, Any]:
    """Return every setting of a training config, and the components ``built``; other sections are left out.

    Raises ValueError, naming the file and the setting, for one that is missing or not allowed.
    """
    return _section(as_now(config), TrainSettings, "", said_by, built)


def _section(
    config: Mapping[str, Any], schema: type, prefix: str, said_by: str, built: Collection[str]
) -> dict[str, Any]:
    hints, taken = typing.get_type_hints(schema), {}
    for field in fields(schema):
        place, hint = f"{prefix}{field.name}", hints[field.name]
        if is_dataclass(hint):
            inner = config.get(field.name)
            if not isinstance(inner, Mapping):
                raise ValueError(f"{said_by} has no section {place}; it is not loaded.")
            taken[field.name] = _section(inner, typing.cast(type, hint), f"{place}.", said_by, built)
        elif hint is not Any:
            taken[field.name] = _setting(config, field.name, hint, place, said_by)
        elif place in built and (config.get(field.name) is not None or field.default is not None):
            taken[field.name] = from_file(config.get(field.name), place, said_by)
    return taken


def _setting(config: Mapping[str, Any], key: str, hint: Any, place: str, said_by: str) -> Any:
    if key not in config:
        raise ValueError(f"{said_by} has no setting {place}; it is not loaded.")
    value = plain_value(config[key], place, said_by)
    try:
        if isinstance(hint, type) and issubclass(hint, Enum):
            hint(value)
        else:
            check_type(place, value, hint)
    except ValueError as error:
        raise ValueError(f"{said_by} is not loaded: {error}") from error
    return value
