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
from typing import Annotated, Any

from pydantic import Field

from core.atomic import atomic_folder
from core.reading import read_regular, reason
from core.records import parse_object, seal, unseal, validate
from train.checkpoint import UnknownVersionError
from train.stores import CheckpointStore

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1: no hash over the file
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
        (aside / FILE_NAME).write_text(json.dumps(seal(content), indent=1), encoding="utf-8")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


@dataclass(frozen=True)
class _Record:
    """Types of what ``dump.json`` holds."""

    format_version: int
    step: Annotated[int, Field(ge=1)]
    metric: str
    value: str
    processes: Annotated[int, Field(ge=1)]
    config: dict[str, Any]
    data_manifest_hash: str
    code: dict[str, str]


def read_dump(path: Path) -> Dump:
    """Raise ValueError for a folder that is no dump, or a damaged one; PermissionError where it may not be read."""
    file = path / FILE_NAME
    try:
        content = parse_object(read_regular(file), str(file))
        version = content.get("format_version")
        content = unseal(content, str(file), required=version == FORMAT_VERSION)
        if version not in READABLE_VERSIONS:
            raise UnknownVersionError(
                f"{file} has format version {version!r}, but this program reads versions {READABLE_VERSIONS[0]} to "
                f"{READABLE_VERSIONS[-1]}; use the program that wrote it."
            )
        record = validate(_Record, content, str(file))
        fields = {key: value for key, value in vars(record).items() if key not in ("format_version", "value")}
        return Dump(path=path, value=float(record.value), **fields)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{path} is no dump of a diverged run: it has no {FILE_NAME}; give a folder like RUN/nonfinite_00001234."
        ) from error
    except UnknownVersionError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({reason(error, file)}); the run's own command diverges again and renews it."
        ) from error
