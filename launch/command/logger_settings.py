"""Settle where a job logs: ``logger=null`` means ``train/logger=none``, and a report logs where its runs did."""

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launch.command.words import key_of
from train.runfolder import RunFolder

NOWHERE = {"_target_": "train.loggers.NoLogger", "_partial_": True}


def settle_logger(config: DictConfig) -> None:
    """Replace ``logger=null`` and ``logger=none`` by the logger that keeps nothing.

    Raises ValueError for anything else that is not a component.
    """
    given = config.logger
    if given in (None, False, "", "none", "None"):
        OmegaConf.update(config, "logger", NOWHERE, merge=False)
    elif not isinstance(given, DictConfig):
        raise ValueError(f"logger is {given!r}, but a logger is chosen by train/logger=wandb or train/logger=none.")


def settle_reports_logger(config: DictConfig, words: list[str]) -> None:
    """Disable the logger of a report if no run of its sweep was logged, unless the command line chooses one."""
    settle_logger(config)
    chosen = any(key_of(word) in ("train/logger", "logger") for word in words)
    if not chosen and _none_was_logged(Path(config.sweep).glob("*/config.yaml")):
        OmegaConf.update(config, "logger", NOWHERE, merge=False)


def _none_was_logged(files: Iterable[Path]) -> bool:
    loggers = [RunFolder(file.parent).read_config().get("logger") for file in files]
    targets = [logger.get("_target_") for logger in loggers if isinstance(logger, dict)]
    return bool(targets) and set(targets) == {NOWHERE["_target_"]}
