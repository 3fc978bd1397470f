"""Write and read the dump of a diverged run, from which `train.replay` repeats the step that diverged.

``RUN/nonfinite_00001234/`` holds ``dump.json`` and ``checkpoints/step_00001200/``, the last good checkpoint before that
step. The seed and the step determine a batch, and the checkpoint and the steps since determine the state before the
step, so no tensor of the step itself is stored. The checkpoint's files are hard links where the file system supports
them: they take no space while the run keeps that checkpoint, and remain when the run deletes it.
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
    """The metric ``metric`` was not finite in step ``step``, which counts from 1."""

    def __init__(self, sentence: str, step: int, metric: str, value: float) -> None:
        super().__init__(sentence)
        self.step = step
        self.metric = metric
        self.value = value


@dataclass(frozen=True)
class Dump:
    """A diverged run up to the step that diverged, which counts from 1."""

    path: Path
    step: int
    metric: str  # the first one that was not finite
    value: float
    processes: int
    config: dict[str, Any]
    data_manifest_hash: str
    code: dict[str, str]

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoint to continue from; missing if the run diverged before its first."""
        return self.path / "checkpoints"


def write_dump(
    path: Path, store: CheckpointStore, error: DivergedError, facts: Mapping[str, Any], processes: int
) -> None:
    """Store what is needed to repeat the step that diverged: the newest checkpoint before it and the run's ``facts``.

    ``facts`` are those of a checkpoint. A dump of the same step is replaced. Only the job that holds the run's lock may
    call this.
    """
    for leftover in path.parent.glob(".nonfinite_*.tmp"):  # from a job that was killed while it wrote a dump
        shutil.rmtree(leftover, ignore_errors=True)
    earlier = [step for step in store.steps() if step < error.step]
    content = {
        "format_version": FORMAT_VERSION,
        "step": error.step,
        "metric": error.metric,
        "value": str(error.value),  # JSON has no NaN and no infinity
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
    """The fields of ``dump.json`` and their types."""

    format_version: int
    step: Annotated[int, Field(ge=1)]
    metric: str
    value: str
    processes: Annotated[int, Field(ge=1)]
    config: dict[str, Any]
    data_manifest_hash: str
    code: dict[str, str]


def read_dump(path: Path) -> Dump:
    """Return the dump in a folder.

    Raises ValueError where the folder is not a dump or is damaged, and PermissionError where it may not be read.
    """
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
            f"{path} is not a dump of a diverged run: it has no {FILE_NAME}; give a folder like RUN/nonfinite_00001234."
        ) from error
    except UnknownVersionError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({reason(error, file)}); the run's own command diverges again and renews it."
        ) from error
