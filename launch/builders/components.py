"""Make the components that a config names, and decide which of them a config out of a file may name.

A section with ``_target_`` is a component: a class or function of ours and its arguments, made by `build`. What the
command line composes may name anything that can be imported: it is the user's own. A config that was read from a
file is a stranger's: `from_file` looks each name up in a closed table for its place, and no text of it is ever
interpreted.
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


def target_of(section: Mapping[str, Any]) -> Any:
    """Return the class or function that a section names, which says of itself what it needs."""
    return get_object(section["_target_"])


def build(section: Mapping[str, Any], **arguments: Any) -> Any:
    """Make what a section's ``_target_`` names, of its other keys and ``arguments``.

    Sections within it are made first. A class with a ``config_class``, such as a network, gets one object of that, made
    of the keys. With ``_partial_: true`` returns a function that takes the missing arguments.
    Raises ValueError where an argument is missing, and what the component raises.
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
        raise ValueError(f"{section['_target_']} needs a setting {missing[0]!r}; give it.")
    made = taker(**given)
    return made if taker is target else target(made)


def _made(value: Any) -> Any:
    if isinstance(value, Mapping):
        return build(value) if "_target_" in value else {key: _made(inner) for key, inner in value.items()}
    return [_made(inner) for inner in value] if isinstance(value, list) else value


def from_file(section: Any, place: str, said_by: str) -> dict[str, Any]:
    """Return a section of a config that was read from the file ``said_by``, fit for `build`.

    ``place`` is its dotted path, such as ``model`` or ``data.autoencoder``. Raises ValueError that names the file, the
    place and the value where a component is none that this project's own configs put there, where it is made in another
    way than they do, where a setting is unknown or of another type, and where a text has an interpolation.
    """
    if not isinstance(section, Mapping) or "_target_" not in section:
        raise ValueError(f"{said_by} has no component at {place}: there is {_shown(section)}; it is not loaded.")
    name, known = section["_target_"], components().get(place, {})
    if not isinstance(name, str) or name not in known:
        expected = ", ".join(known) or "none"
        raise ValueError(
            f"{place}._target_ is {_shown(name)} in {said_by}, which a checkpoint may not ask for at that place (there "
            f"may be {expected}); it is not loaded."
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
    """Make a component of a section that `from_file` returned. Raises ValueError that names the file for any error."""
    try:
        return build(section)
    except Exception as error:  # numbers that no constructor expects raise errors of many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{said_by} asks for a {section['_target_']} that cannot be made: {reason}") from error


def plain_value(value: Any, place: str, said_by: str) -> Any:
    """Return a scalar, or a list of scalars, out of a file. Raises ValueError for anything that a text could become."""
    if isinstance(value, list):
        return [plain_value(inner, place, said_by) for inner in value]
    if value is not None and not isinstance(value, str | int | float | bool):
        raise ValueError(
            f"{place} is {_shown(value)} in {said_by}, but only plain values may be there; it is not loaded."
        )
    if isinstance(value, str) and ("${" in value or len(value) > _LONGEST_TEXT or not value.isprintable()):
        raise ValueError(
            f"{place} is {_shown(value)} in {said_by}, but a config out of a file is plain text, without "
            "interpolations; it is not loaded."
        )
    return value


@functools.cache
def components() -> dict[str, dict[str, bool]]:
    """Return what this project's configs build: by place, each component's name and whether it is made in two steps.

    A place is the package of the config group: ``model.block`` for ``conf/model/block``, or what its header says.
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
