"""Compose a job's config once. Hydra composes it once more to read ``hydra.mode``, which hardly any command sets."""

import sys
from typing import Any

from hydra._internal.hydra import Hydra

from launch.command.words import MULTIRUN

_get_mode = Hydra.get_mode


def read_mode_where_it_is_set() -> None:
    """Make Hydra compose for ``hydra.mode`` only where the command line may set it. No config of ours does."""
    Hydra.get_mode = _mode  # type: ignore[method-assign]


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Return what Hydra's own method does: None for a config that does not say."""
    flags = [word for word in sys.argv[1:] if word.startswith("-") and word not in MULTIRUN]  # such as --config-dir
    if flags or any("hydra" in word for word in overrides):
        return _get_mode(self, config_name, overrides)
    return None
