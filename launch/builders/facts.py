"""What all processes of a job must have in common."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.urls import redacted_config
from launch.command.app import CONF
from train.checkpoint import code_version

ROOMS = ("data", "diffusion", "evaluation", "launch", "model", "runtime", "train")


def facts_of_process(config: Mapping[str, Any]) -> dict[str, str]:
    """Return every setting by its dotted name, without secrets, the library versions, and the hash of our source."""
    return {**dict(_settings(redacted_config(config))), **code_version(), "source code": source_hash(CONF.parent)}


def _settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def source_hash(root: Path) -> str:
    """Of every Python file in the rooms below ``root``, with its path."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
