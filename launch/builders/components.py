"""Build the components that a config names, and decide which of them a config read from a file may name.

A section with ``_target_`` is a component: a class or function of ours and its arguments, which `build` makes. A config
that the command line composes is the user's own and may name anything that can be imported. A config read from a file
is not trusted: `from_file` looks each name up in a closed table for its place, and never interprets any text of it.
"""

import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

import yaml
from hydra.utils import get_object

from launch.command.app import CONF
from launch.command.check import check_parameters, taker_of_settings

_PACKAGE = re.compile(r"^# @package (\S+)", re.MULTILINE)
_LONGEST_TEXT = 4096
# Names that earlier versions wrote, in the sections of a config that jobs still read from files.
_MOVED = {
    "data.image_tars.ImageTars": "data.tars.ImageTars",
    "data.latent_tars.LatentTars": "data.tars.LatentTars",
    "diffusion.flow.StraightFlow": "diffusion.flow.Flow",
}


def target_of(section: Mapping[str, Any]) -> Any:
    """Return the class or function that a section names, whose attributes describe it."""
    return get_object(section["_target_"])


def build(section: Mapping[str, Any], **arguments: Any) -> Any:
    """Build the component that a section's ``_target_`` names from the other keys and ``arguments``.

    Inner sections are built first. A class with a ``config_class``, such as a network, gets one object of that class,
    built from the keys. With ``_partial_: true``, returns a function that takes the missing arguments.
    Raises ValueError where an argument is missing, and whatever the component raises.
    """
    target = target_of(section)
    taker = taker_of_settings(target)
    given = {key: _made(value) for key, value in section.items() if not key.startswith("_")} | arguments
    if section.get("_partial_"):
        return functools.partial(target, **given)
    parameters = inspect.signature(taker).parameters.values()
    missing = [
        p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in given
    ]
    if missing:
        raise ValueError(f"{section['_target_']} needs the setting {missing[0]!r}; give it.")
    made = taker(**given)
    return made if taker is target else target(made)


def _made(value: Any) -> Any:
    if isinstance(value, Mapping):
        return build(value) if "_target_" in value else {key: _made(inner) for key, inner in value.items()}
    return [_made(inner) for inner in value] if isinstance(value, list) else value


def from_file(section: Any, place: str, said_by: str) -> dict[str, Any]:
    """Return a section of a config that was read from the file ``said_by``, checked so that `build` may take it.

    ``place`` is its dotted path, such as ``model`` or ``data.autoencoder``. Raises ValueError, naming the file, the
    place and the value, where this project's own configs have no such component at that place, where its ``_partial_``
    differs from theirs, where a setting is unknown or of another type, and where a text has an interpolation.
    """
    if not isinstance(section, Mapping) or "_target_" not in section:
        raise ValueError(f"{said_by} has no component at {place}, but {_shown(section)}; it is not loaded.")
    name, known = section["_target_"], components().get(place, {})
    name = _MOVED.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in known:
        expected = ", ".join(known) or "none"
        raise ValueError(
            f"{place}._target_ is {_shown(name)} in {said_by}, which a checkpoint may not ask for at that place "
            f"(allowed: {expected}); it is not loaded."
        )
    taken: dict[str, Any] = {"_target_": name}
    for key, value in section.items():
        if key == "_target_":
            continue
        if key == "_partial_" and value is known[name]:
            taken[key] = value
        elif not isinstance(key, str) or key.startswith("_"):
            raise ValueError(
                f"{place}.{key} is given in {said_by}, which a checkpoint may not ask for; it is not loaded."
            )
        elif isinstance(value, Mapping):
            taken[key] = from_file(value, f"{place}.{key}", said_by)
        else:
            taken[key] = plain_value(value, f"{place}.{key}", said_by)
    if known[name] and "_partial_" not in taken:
        raise ValueError(
            f"{place}._partial_ is missing in {said_by}, which every config of ours has; it is not loaded."
        )
    try:
        check_parameters(taken, f"{place}.")
    except ValueError as error:
        raise ValueError(f"{said_by} is not loaded: {error}") from error
    return taken


def build_saved(section: Mapping[str, Any], said_by: str) -> Any:
    """Build a component from a section that `from_file` returned. Raises ValueError, naming the file, for any error."""
    try:
        return build(section)
    except Exception as error:  # values that a constructor does not expect raise errors of many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{said_by} asks for a {section['_target_']} that cannot be built: {reason}") from error


def plain_value(value: Any, place: str, said_by: str) -> Any:
    """Return a scalar, or a list of scalars, read from a file. Raises ValueError for other values or unsafe text."""
    if isinstance(value, list):
        return [plain_value(inner, place, said_by) for inner in value]
    if value is not None and not isinstance(value, str | int | float | bool):
        raise ValueError(
            f"{place} is {_shown(value)} in {said_by}, but only plain values are allowed there; it is not loaded."
        )
    if isinstance(value, str) and ("${" in value or len(value) > _LONGEST_TEXT or not value.isprintable()):
        raise ValueError(
            f"{place} is {_shown(value)} in {said_by}, but a config read from a file must be plain text without "
            "interpolations; it is not loaded."
        )
    return value


@functools.cache
def components() -> dict[str, dict[str, bool]]:
    """Return the components that this project's configs build: by place, each one's name and whether it is partial.

    A place is the package of a config group: ``model.block`` for ``conf/model/block``, or the one in the file's header.
    """
    found: dict[str, dict[str, bool]] = {}
    for path in sorted(CONF.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        header, content = _PACKAGE.search(text), yaml.safe_load(text)
        if path.parent == CONF or not isinstance(content, dict) or "_target_" not in content:
            continue
        place = header.group(1) if header else ".".join(path.parent.relative_to(CONF).parts)
        found.setdefault(place, {})[content["_target_"]] = bool(content.get("_partial_", False))
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
