"""Settle where a job logs to: ``logger=null`` says ``train/logger=none``, and a report logs as its runs did."""

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from train.runfolder import RunFolder

NOWHERE = {"_target_": "train.loggers.NoLogger", "_partial_": True}


def settle_logger(config: DictConfig) -> None:
    """Replace what ``logger=null`` and ``logger=none`` leave by the logger that keeps nothing.

    Raises ValueError for anything else that is no component.
    """
    given = config.logger
    if given in (None, False, "", "none", "None"):
        OmegaConf.update(config, "logger", NOWHERE, merge=False)
    elif not isinstance(given, DictConfig):
        raise ValueError(f"logger is {given!r}, but it is chosen by train/logger=wandb or train/logger=none.")


def settle_reports_logger(config: DictConfig, words: list[str]) -> None:
    """Log no report of runs none of which was logged, unless the command line chooses a logger."""
    settle_logger(config)
    chosen = any(word.lstrip("+~").split("=", 1)[0] in ("train/logger", "logger") for word in words)
    if not chosen and _none_was_logged(Path(config.sweep).glob("*/config.yaml")):
        OmegaConf.update(config, "logger", NOWHERE, merge=False)


def _none_was_logged(files: Iterable[Path]) -> bool:
    loggers = [RunFolder(file.parent).read_config().get("logger") for file in files]
    targets = [logger.get("_target_") for logger in loggers if isinstance(logger, dict)]
    return bool(targets) and set(targets) == {NOWHERE["_target_"]}
