"""Define the base class of settings: dataclasses that state their constraints, converted from and to plain values.

A class of settings is defined next to the code that it configures. Hydra composes its values, `of` constructs it,
``__post_init__`` validates it, and the result of `plain` is saved and hashed. Sections that name a component
(``_target_``) stay mappings.
"""

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, ClassVar, Self

MUST_BE_GIVEN: Any = "???"  # Hydra's marker for a value without a default


def positive(default: Any = MUST_BE_GIVEN, *, free: bool = False) -> Any:
    """Return a field whose number must be above 0; None is valid if the type allows it."""
    return field(default=default, metadata={"positive": True, "free": free})


def free(default: Any = MUST_BE_GIVEN) -> Any:
    """Return a field that a resumed run may change: it affects weights and losses at most by float rounding."""
    return field(default=default, metadata={"free": True})


@dataclass
class Settings:
    """The values of a section. Raises ValueError with the dotted name for a number that its field does not allow."""

    section: ClassVar[str] = ""  # the dotted name of the section; empty for a job's own settings

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.metadata.get("positive") and isinstance(value, int | float) and value <= 0:
                never = " (null is never)" if each.name.endswith("_every") else ""
                name = f"{self.section}.{each.name}".lstrip(".")
                raise ValueError(f"{name} is {value}, but it must be positive{never}; set it higher.")

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Return the settings made from plain values; those with a default may be absent."""
        hints = typing.get_type_hints(cls)
        return cls(
            **{each.name: _typed(plain[each.name], hints[each.name]) for each in fields(cls) if each.name in plain}
        )

    def plain(self) -> dict[str, Any]:
        """Return the values as they are saved (mappings, lists, text and numbers), without those not given."""
        return {
            each.name: _plain(value)
            for each in fields(self)
            if not (isinstance(value := getattr(self, each.name), str) and value == MUST_BE_GIVEN)
        }


def free_settings(kind: type[Settings], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all free settings. A section is free where its field is."""
    for each, hint in _hinted(kind):
        if each.metadata.get("free"):
            yield f"{prefix}{each.name}"
        elif is_dataclass(hint):
            yield from free_settings(typing.cast(type[Settings], hint), f"{prefix}{each.name}.")


def components(kind: type[Settings], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the sections that name a component, except free ones."""
    for each, hint in _hinted(kind):
        if each.metadata.get("free"):
            continue
        if hint is Any:
            yield f"{prefix}{each.name}"
        elif is_dataclass(hint):
            yield from components(typing.cast(type[Settings], hint), f"{prefix}{each.name}.")


def _hinted(kind: type[Settings]) -> Iterator[tuple[Any, Any]]:
    hints = typing.get_type_hints(kind)
    for each in fields(kind):
        yield each, hints[each.name]


def _typed(value: Any, hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, Settings) and isinstance(value, Mapping):
        return hint.of(value)
    return hint(value) if isinstance(hint, type) and issubclass(hint, Enum) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.plain()
    return value.value if isinstance(value, Enum) else value
