"""Check a sweep before its first run starts."""

import itertools
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from launch.command.app import CONF
from launch.command.help import bases_of


class OneFolderForEachRun(Callback):
    """Refuses a sweep in which two runs would write into one folder, before any of them starts.

    A run's ``name`` contains size, patch size, block and seed; a sweep over anything else must add it to the name.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Compose every run of the sweep as Hydra will, and compare their folders.

        Exits itself instead of raising: Hydra would turn the exception of a callback into a warning.
        """
        loader = GlobalHydra.instance().config_loader()
        swept = _swept(config, loader)
        _refuse_swept_sweepers(swept)
        by_folder: defaultdict[str, list[Sequence[str]]] = defaultdict(list)
        try:
            for overrides in itertools.product(*swept.values()):
                run = loader.load_sweep_config(config, list(overrides))
                HydraConfig.instance().set_config(run)
                by_folder[str(run.run_dir)].append([word for word in overrides if len(swept[_key(word)]) > 1])
        except Exception:  # a mistake in an override: Hydra composes the same runs next and reports it
            return
        finally:
            HydraConfig.instance().set_config(config)
        for folder, runs in by_folder.items():
            if len(runs) > 1:
                _refuse(folder, len(runs), runs[0], runs[1])


def _swept(config: DictConfig, loader: ConfigLoader) -> dict[str, list[str]]:
    """Return all values of each overridden setting, as ``key=value``. The command line overrides the config."""
    hydra: Any = OmegaConf.to_container(config.hydra, resolve=False)  # interpolations are resolved in each run
    words = [f"{key}={value}" for key, value in (hydra["sweeper"]["params"] or {}).items()]
    words += hydra["overrides"]["task"]
    overrides: list[Override] = OverridesParser.create(config_loader=loader).parse_overrides(words)
    swept = {}
    for override in overrides:
        key = override.get_key_element()
        is_sweep = override.is_sweep_override() and override.is_discrete_sweep()
        values = override.sweep_string_iterator() if is_sweep else [override.get_value_element_as_str()]
        swept[key] = [f"{key}={value}" for value in values]
    return swept


def _refuse_swept_sweepers(swept: dict[str, list[str]]) -> None:
    """Exit where several options of a group are swept and one of them sets a sweep or a launcher.

    Hydra reads those before it composes the runs, so the first option's would apply to all runs.
    """
    for key, words in swept.items():
        folder = CONF / key
        options = [word.split("=", 1)[1] for word in words]
        own = [option for option in options if _has_hydra_section(folder / f"{option}.yaml")]
        if len(options) > 1 and own:
            print(
                f"ditscale train: error: {key} has {len(options)} values, but {own[0]} sets a sweep or a launcher of "
                f"its own, which would apply to all of them; give each {key} in a command of its own: "
                f"{', '.join(f'-m {word}' for word in words)}.",
                file=sys.stderr,
            )
            sys.exit(2)


def _has_hydra_section(path: Path) -> bool:
    """Return whether a config file, or a file that its defaults name, has a ``hydra`` section."""
    if not path.is_file():
        return False
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    bases = bases_of(content)
    group = next(parent for parent in path.parents if parent.parent == CONF)
    places = [place / f"{name}.yaml" for name in bases for place in (path.parent, group)]
    return "hydra" in content or any(_has_hydra_section(place) for place in places)


def _key(word: str) -> str:
    return word.split("=", 1)[0]


def _refuse(folder: str, count: int, one: Sequence[str], other: Sequence[str]) -> NoReturn:
    differing = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    a, b = differing[0] if differing else (one[0], other[0])
    key = _key(a).lstrip("+")
    print(
        f"ditscale train: error: {count} runs of this sweep would share the folder {folder}, for instance {a} and {b}; "
        f"put what differs into the name: 'name=${{default_name}}-{key.rsplit('.', 1)[-1]}${{{key}}}'.",
        file=sys.stderr,
    )
    sys.exit(2)
