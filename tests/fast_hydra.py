"""Make Hydra compose configs in half the time, to the same values: the tests compose a thousand in one process.

Hydra reads each file of a config again for every command, and makes a table of choices for each file, which only
interpolated defaults look at. `tests/unit/test_house.py` compares.
"""

import copy
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from omegaconf import DictConfig, OmegaConf

_load_config = ConfigRepository.load_config
_create_interpolation_map = defaults_list._create_interpolation_map
_loaded: dict[Any, Any] = {}


def install() -> None:
    """Have Hydra compose so in this process."""
    ConfigRepository.load_config = _once  # type: ignore[method-assign]
    defaults_list._create_interpolation_map = _where_it_is_used


def remove() -> None:
    """Have Hydra compose as it does by itself."""
    ConfigRepository.load_config = _load_config  # type: ignore[method-assign]
    defaults_list._create_interpolation_map = _create_interpolation_map


def _once(self: ConfigRepository, config_path: str) -> Any:
    """Return a copy of what was read before from the same places; a test may write configs of its own in others."""
    key = (config_path, *(source.path for source in self.sources))
    if key not in _loaded:
        _loaded[key] = _load_config(self, config_path)
    return copy.deepcopy(_loaded[key])


def _where_it_is_used(overrides: Any, defaults: list[Any], self_added: bool) -> DictConfig:
    if "$" in repr((defaults, overrides.known_choices, overrides.override_choices)):
        return _create_interpolation_map(overrides, defaults, self_added)
    return OmegaConf.create()
