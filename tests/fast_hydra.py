"""Make Hydra compose configs in a third of the time, to the same values: the tests compose a thousand in one process.

Hydra reads each file of a config again for every command, merges the same files again, and makes a table of choices
for each file, which only interpolated defaults look at. `tests/unit/test_house.py` compares.
"""

import copy
from collections.abc import Iterable
from typing import Any

import hydra
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from launch.command.app import CONF
from launch.command.settings import register

# What a job cannot be composed without.
NEEDED = {"train": ["shape_name=x"], "plan": ["shape_name=x"], "report": ["sweep=x"], "reference": ["out=x"]}
NEEDED |= {job: ["checkpoint=x"] for job in ("sample", "serve", "evaluate")}
NEEDED["export"] = ["checkpoint=x", "to=reference", "out=x"]
NEEDED["status"] = NEEDED["report"]

_load_config = ConfigRepository.load_config
_create_interpolation_map = defaults_list._create_interpolation_map
_merge = ConfigLoaderImpl._compose_config_from_defaults_list
_loaded: dict[Any, Any] = {}
_merged: dict[Any, DictConfig] = {}


def install() -> None:
    """Have Hydra compose so in this process."""
    ConfigRepository.load_config = _once  # type: ignore[method-assign]
    ConfigLoaderImpl._compose_config_from_defaults_list = _merged_once  # type: ignore[method-assign]
    defaults_list._create_interpolation_map = _where_it_is_used


def composed(job: str, *overrides: str) -> DictConfig:
    """Return a job's config as Hydra composes it."""
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=job):
        return hydra.compose(config_name=job, overrides=[*NEEDED.get(job, []), *overrides])


def prepare(jobs: Iterable[str]) -> None:
    """Read what these jobs read, before the process forks them."""
    install()
    for job in jobs:
        composed(job)
    GlobalHydra.instance().clear()


def remove() -> None:
    """Have Hydra compose as it does by itself."""
    ConfigRepository.load_config = _load_config  # type: ignore[method-assign]
    ConfigLoaderImpl._compose_config_from_defaults_list = _merge  # type: ignore[method-assign]
    defaults_list._create_interpolation_map = _create_interpolation_map


def _once(self: ConfigRepository, config_path: str) -> Any:
    """Return what was read before from the same places, unmerged; a test may write configs of its own in others."""
    key = (config_path, *(source.path for source in self.sources))
    if key not in _loaded:
        _loaded[key] = _load_config(self, config_path)
    return copy.copy(_loaded[key])


def _merged_once(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
    """Return a copy of what the same files from the same places were merged to; a command's own values come later."""
    key = (repr(defaults), *(source.path for source in repo.get_sources()))
    if key not in _merged:
        copied: Any = copy.copy(repo)
        copied.cache = copy.deepcopy(repo.cache)  # merging makes parts of what was read parts of the result
        _merged[key] = _merge(self, defaults, copied)
    return copy.deepcopy(_merged[key])


def _where_it_is_used(overrides: Any, defaults: list[Any], self_added: bool) -> DictConfig:
    if "$" in repr((defaults, overrides.known_choices, overrides.override_choices)):
        return _create_interpolation_map(overrides, defaults, self_added)
    return OmegaConf.create()
