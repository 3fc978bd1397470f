"""Checks of a composed config before anything is built."""

import inspect
import json
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
    """Every key of a typed section must be of its schema, also one forced in with ``+``. Raises ValueError."""
    schema = OmegaConf.get_type(config)
    names = [field.name for field in fields(schema)] if schema is not None and is_dataclass(schema) else None
    for key in map(str, config):
        if names is not None and key not in names:
            raise ValueError(f"There is no setting '{path}{key}'{closest(key, names)}")
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            check_known(config[key], f"{path}{key}.")


def check_targets(node: Any, path: str = "") -> None:
    """Walk every ``_target_``: each key must be a parameter of it, each scalar of the parameter's type.

    Raises ValueError with the closest valid name.
    """
    for place, section in _sections(node, path):
        if "_target_" in section:
            check_parameters(section, place)


def _sections(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping at or below ``node``, in lists too, with its dotted path."""
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
    except Exception as error:  # hydra raises several kinds, ImportError of the target's module among them
        raise ValueError(f"{path}_target_ is {name!r}, which cannot be imported: {error}") from error
    target = taker_of_settings(target)
    parameters, hints = inspect.signature(target).parameters, _hints(target)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key not in parameters and not takes_any:
            raise ValueError(f"{name} has no setting {path}{key}{closest(key, parameters)}")
        if isinstance(value, str | int | float | bool | list) and key in hints:
            check_type(f"{path}{key}", value, hints[key])


def taker_of_settings(target: Any) -> Callable[..., Any]:
    """Return what has a section's keys as its parameters: the target, or the class of the one config that it takes."""
    taker: Callable[..., Any] = getattr(target, "config_class", target)
    return taker


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Parameter types of a class or function; what cannot be resolved is not checked."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError where a scalar, or a list, is not of the type ``hint``; ``name`` stands in the sentence."""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, SchemaError):  # no type that pydantic can judge, such as a Protocol
        return
    try:
        if isinstance(value, list):
            adapter.validate_json(json.dumps(value), strict=True)  # from JSON, a list may become a tuple
        else:
            adapter.validate_python(value, strict=True)
    except ValidationError as error:
        found = error.errors()[0]
        missing = found["type"] == "missing"
        reason = f"it has no value at {found['loc'][-1]}" if missing else found["msg"].lower()
        raise ValueError(f"{name} is {value!r}, but {reason}.") from error


def check_readers(num_processes: int, num_shards: int) -> None:
    """Processes must not outnumber the shards that they read. Raises ValueError with both numbers."""
    if num_processes > num_shards:
        raise ValueError(
            f"{num_processes} processes would read {num_shards} shards; encode with a smaller "
            f"data.samples_per_shard, or start at most {num_shards} processes."
        )
