"""The settings and versions that all processes of a job must have in common."""

from collections.abc import Iterator, Mapping
from typing import Any

from core.rooms import MAY_IMPORT, source_hash
from core.urls import redacted_config
from train.checkpoint import code_version


def facts_of_process(config: Mapping[str, Any]) -> dict[str, str]:
    """Return every setting by its dotted name, without secrets, the library versions, and the hash of our source."""
    return {**dict(_settings(redacted_config(config))), **code_version(), "source code": code_hash()}


def _settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def code_hash() -> str:
    """Return a short hash of this program's source."""
    return source_hash(*MAY_IMPORT)[:12]
