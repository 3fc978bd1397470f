"""What a diverged run leaves behind, so that its last step can be run again: `train.replay` does.

``RUN/nonfinite_00001234/``: ``dump.json`` and ``checkpoints/step_00001200/``, the last good checkpoint before that
step. A batch follows from seed and step, and the state before the step from the checkpoint and the steps since, so
no tensor of the step itself is kept. The checkpoint's files are hard links where the disk has them: they take no
room while the run keeps that checkpoint, and stay when it lets it go.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import atomic_folder
from train.checkpoint import UnknownVersionError
from train.stores import CheckpointStore

FORMAT_VERSION = 1
FILE_NAME = "dump.json"


class DivergedError(FloatingPointError):
    """``metric`` was not finite in ``step``, which counts from 1."""

    def __init__(self, sentence: str, step: int, metric: str, value: float) -> None:
        super().__init__(sentence)
        self.step = step
        self.metric = metric
        self.value = value


@dataclass(frozen=True)
class Dump:
    """A diverged run up to the step at fault, which counts from 1."""

    path: Path
    step: int
    metric: str  # the first that was not finite
    value: float
    processes: int
    config: dict[str, Any]
    data_manifest_hash: str
    code: dict[str, str]

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoint to continue from lies; without one the run diverged before its first."""
        return self.path / "checkpoints"


def write_dump(
    path: Path, store: CheckpointStore, error: DivergedError, facts: Mapping[str, Any], processes: int
) -> None:
    """Keep what leads to the step at fault: the newest checkpoint before it, and the ``facts`` that checkpoints have.

    A dump of the same step is replaced. Only for the job that holds the run's lock.
    """
    for leftover in path.parent.glob(".nonfinite_*.tmp"):  # of a job that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    earlier = [step for step in store.steps() if step < error.step]
    content = {
        "format_version": FORMAT_VERSION,
        "step": error.step,
        "metric": error.metric,
        "value": str(error.value),  # JSON has no number for it
        "processes": processes,
        **{key: facts[key] for key in ("config", "data_manifest_hash", "code")},
    }
    with atomic_folder(path) as aside:
        for checkpoint in map(store.local, earlier[-1:]):
            shutil.copytree(checkpoint, aside / "checkpoints" / checkpoint.name, copy_function=_link_or_copy)
        (aside / FILE_NAME).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def read_dump(path: Path) -> Dump:
    """Raises ValueError for a folder that is no dump, or a damaged one; PermissionError where it may not be read."""
    file = path / FILE_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if (version := content.pop("format_version")) == FORMAT_VERSION:
            content["value"] = float(content["value"])
            return Dump(path=path, **content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{path} is no dump of a diverged run: it has no {FILE_NAME}; give a folder like RUN/nonfinite_00001234."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); the run's own command diverges again and renews it.") from error
    raise UnknownVersionError(
        f"{file} has format version {version}, but this program reads version {FORMAT_VERSION}; use the program that "
        "wrote it."
    )
