"""The folder of one run, and the rules for continuing it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data.atomic import append_line, write_bytes
from train.checkpoint import list_checkpoints

# Sections that change no result beyond float rounding: a run may continue on other hardware or loggers.
FREE_SECTIONS = frozenset({"runtime", "logger", "run_dir", "sweep_dir", "name", "group", "progress"})


class RunFolder:
    """``config.yaml``, ``metrics.jsonl``, ``timing.jsonl``, ``evaluations.jsonl``, ``checkpoints/``, ``samples/``.

    A checkpoint is the point of commit: lines that were written after the one that a run continues from
    are taken back, since the run will write them again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.timing = path / "timing.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    def grid(self, step: int) -> Path:
        """Where the sample grid of a step lies."""
        return self.samples / f"step_{step:08d}.png"

    def claim(self, config: Mapping[str, Any]) -> None:
        """Make this the folder of ``config``, or find that it is. Raises ValueError where it holds another."""
        if not self.config.exists():
            write_bytes(self.config, yaml.safe_dump(dict(config), sort_keys=False).encode())
            return
        differences = _differences(self.read_config(), config)
        if differences:
            raise ValueError(
                f"The run folder {self.path} already holds another config: {'; '.join(differences)}; "
                "set run_dir to another folder, or give the same settings to continue that run."
            )

    def read_config(self) -> dict[str, Any]:
        """The resolved config. Raises ValueError where it cannot be read."""
        try:
            content = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{self.config} cannot be read ({error}); is {self.path} a run folder?") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.config} holds no config; is {self.path} a run folder?")
        return content

    def append(self, file: Path, record: Mapping[str, Any]) -> None:
        """Add one JSON line to a file of this folder."""
        append_line(file, json.dumps(dict(record)))

    def roll_back(self, step: int) -> None:
        """Drop lines of steps after ``step``, and a last line that a crash cut short."""
        for file in (self.metrics, self.timing, self.evaluations):
            if file.exists():
                kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _is_until(line, step)]
                write_bytes(file, "".join(line + "\n" for line in kept).encode())

    def retain_checkpoints(self, keep: int) -> None:
        """Delete all but the newest ``keep``."""
        for path in list_checkpoints(self.checkpoints)[:-keep]:
            shutil.rmtree(path)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; none where it does not exist. A last line cut by a crash is left out."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is empty or cut


def _is_until(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Sentences "key is A there and B now", for keys outside the free sections."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        name = f"{prefix}{key}"
        if not prefix and key in FREE_SECTIONS:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name} is {before!r} there and {after!r} now")
    return found
