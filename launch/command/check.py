"""Check a composed config before anything is built."""

import functools
import inspect
import json
import math
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from core.closest import closest


def check_known(config: DictConfig, path: str = "") -> None:
    """Raise ValueError for a key of a typed section that its schema does not have, even one added with ``+``."""
    schema = OmegaConf.get_type(config)
    names = [field.name for field in fields(schema)] if schema is not None and is_dataclass(schema) else None
    for key in map(str, config):
        if names is not None and key not in names:
            raise ValueError(f"There is no setting '{path}{key}'{closest(key, names)}")
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            check_known(config[key], f"{path}{key}.")


def check_finite(node: Any, path: str = "") -> None:
    """Raise ValueError for an infinite number or none (NaN), which the JSON of checkpoints and records has not."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            check_finite(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for value in node:
            check_finite(value, path)
    elif isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{path} is {node}, but a setting must be a finite number; give another, or leave it out.")


def check_targets(node: Any, path: str = "") -> None:
    """Check each section with a ``_target_``: its keys must be the target's parameters, its values of their types.

    Raises ValueError with the closest valid name.
    """
    for place, section in _sections(node, path):
        if "_target_" in section:
            check_parameters(section, place)


def _sections(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every mapping at or below ``node``, also within lists, with its dotted path."""
    if isinstance(node, Mapping):
        yield path, node
        for key, value in node.items():
            yield from _sections(value, f"{path}{key}.")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _sections(value, f"{path}{number}.")


def check_parameters(config: Mapping[str, Any], path: str) -> None:
    """Check one section with a ``_target_``, as `check_targets` does. Raises ValueError."""
    name = config["_target_"]
    try:
        target = get_object(name)
    except Exception as error:  # Hydra raises several kinds, among them the ImportError of the target's module
        raise ValueError(f"{path}_target_ is {name!r}, which cannot be imported: {error}") from error
    target = taker_of_settings(target)
    parameters, hints = inspect.signature(target).parameters, _hints(target)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key not in parameters and not takes_any:
            hint = closest(key, parameters)
            if hint == "." or _is_an_experiments(f"{path}{key}"):
                hint = f"; leave it out, or give '~{path}{key}' where an experiment sets it."
                given = [p.name for p in parameters.values() if p.default is p.empty and "_partial_" in config]
                own = ", ".join(parameter for parameter in parameters if parameter not in given)
                name = f"{name}, which has {f'the settings {own}' if own else 'no settings'},"
            raise ValueError(f"{name} has no setting {path}{key}{hint}")
        if isinstance(value, str | int | float | bool | list) and key in hints:
            check_type(f"{path}{key}", value, hints[key])


def _is_an_experiments(name: str) -> bool:
    """Return whether the command line chooses an experiment and does not give the setting ``name`` itself."""
    keys = {word.partition("=")[0].lstrip("+~") for word in sys.argv[1:]}
    return "experiment" in keys and name not in keys


def taker_of_settings(target: Any) -> Callable[..., Any]:
    """Return the callable that takes a section's keys: the target, or its ``config_class`` where it has one."""
    taker: Callable[..., Any] = getattr(target, "config_class", target)
    return taker


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameter types of a class or function, or nothing where they cannot be resolved."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


@functools.cache
def _checker_of(hint: Any) -> TypeAdapter[Any] | None:
    """Return pydantic's checker of a type, or None for one that it cannot check, such as a Protocol."""
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, SchemaError):
        return None


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError, naming ``name``, where a scalar or a list is not of the type ``hint``."""
    adapter = _checker_of(hint)
    if adapter is None:
        return
    try:
        if isinstance(value, list):
            adapter.validate_json(json.dumps(value), strict=True)  # in JSON mode, a list may become a tuple
        else:
            adapter.validate_python(value, strict=True)
    except ValidationError as error:
        found = error.errors()[0]
        missing = found["type"] == "missing"
        reason = f"it has no value at {found['loc'][-1]}" if missing else found["msg"].lower()
        raise ValueError(f"{name} is {value!r}, but {reason}.") from error


def check_readers(num_processes: int, num_shards: int) -> None:
    """Raise ValueError with both numbers where there are more processes than shards to read."""
    if num_processes > num_shards:
        raise ValueError(
            f"{num_processes} processes would read {num_shards} shards; encode with a smaller "
            f"data.samples_per_shard, or start at most {num_shards} processes."
        )
