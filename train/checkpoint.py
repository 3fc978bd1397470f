"""Checkpoints: complete or absent, in safetensors that a stranger can read.

``step_00000500/``: ``model``, ``ema`` and ``optimizer`` ``.safetensors``, a file for each further average, and
``state.json`` with the step, the facts of the run and the SHA-256 of each file. A large part that several processes
wrote is several files, ``ema-00001-of-00004.safetensors``, with an index ``ema.safetensors.index.json`` as Hugging
Face's libraries have it. `train.saving` writes them.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.reading import sha256_of
from train.state import TrainState, load_optimizer_tensors
from train.stores import STATE_FILE, CheckpointStore

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1: a part is one file
REQUIRED_KEYS = ("step", "seed", "config", "spec", "data_manifest_hash", "sha256")
_PART_OF = re.compile(r"(.+)-\d{5}-of-\d{5}")


def file_names(part: str, owners: Sequence[Sequence[str]]) -> list[str | None]:
    """The file in which each process writes its tensors of a part; None for a process that has none of them."""
    writers = [rank for rank, names in enumerate(owners) if names] or [0]
    if len(writers) == 1:
        return [f"{part}.safetensors" if rank in writers else None for rank in range(len(owners))]
    names = {rank: f"{part}-{n:05d}-of-{len(writers):05d}.safetensors" for n, rank in enumerate(writers, start=1)}
    return [names.get(rank) for rank in range(len(owners))]


def index_name(part: str) -> str:
    """The file that says which of a part's files has which tensor."""
    return f"{part}.safetensors.index.json"


def part_of(file_name: str) -> str:
    """The part that a safetensors file belongs to."""
    stem = file_name.removesuffix(".safetensors")
    match = _PART_OF.fullmatch(stem)
    return match.group(1) if match else stem


class UnknownVersionError(ValueError):
    """A checkpoint of a later program: no damage, and no reason to go on from an older one."""


def read_state_file(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint folder.

    Raises ValueError where there is none that can be read, PermissionError where it may not be read.
    """
    if not path.is_dir():
        raise ValueError(f"There is no checkpoint folder {path}; give one like RUN/checkpoints/step_00000500.")
    try:
        content: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        version = content["format_version"]
        absent = [key for key in REQUIRED_KEYS if key not in content]
        if absent:
            raise ValueError(f"it has no {absent[0]}")
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The checkpoint {path} cannot be read: state.json is missing or damaged ({error}); "
            "use another checkpoint of that run."
        ) from error
    if version not in READABLE_VERSIONS:
        raise UnknownVersionError(
            f"The checkpoint {path} has format version {version}, but this program reads versions "
            f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}; use the program that wrote it."
        )
    return content


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Tensors of the part ``name`` on the host. Raises ValueError where a file is damaged, naming it."""
    hashes: dict[str, str] = read_state_file(path)["sha256"]
    files = [file_name for file_name in hashes if part_of(file_name) == name]
    if not files:
        weights = ", ".join(dict.fromkeys(part for part in map(part_of, hashes) if part != "optimizer"))
        raise ValueError(f"The checkpoint {path} has no weights {name!r}; it has {weights}.")
    tensors: dict[str, Tensor] = {}
    for file_name in files:
        tensors |= _read_file(path, file_name, hashes[file_name])
    return tensors


def _read_file(path: Path, file_name: str, expected: str) -> dict[str, Tensor]:
    file = path / file_name
    if not file.is_file():
        raise ValueError(f"The checkpoint {path} has no {file.name}; use another checkpoint of that run.")
    if (found := sha256_of(file)) != expected:
        raise ValueError(
            f"The checkpoint {path} is damaged: {file.name} should have sha256 {expected}, but has {found}; "
            "use another checkpoint of that run."
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file ({error}).") from error


def load_weights(module: nn.Module, path: Path, name: str) -> None:
    """Load ``model`` weights or an average. Raises ValueError for a damaged file or another architecture."""
    fill(module, path, read_tensors(path, name))


def fill(module: nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    """Give a module the weights of a checkpoint. Raises ValueError where they are of another architecture."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"The checkpoint {path} is of another model than the config: {error}") from error


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Restore everything in place. Raises ValueError for a damaged checkpoint."""
    load_weights(state.model, path, "model")
    for name, module in state.ema.modules.items():
        load_weights(module, path, name)
    load_optimizer_tensors(state.model, state.optimizer, read_tensors(path, "optimizer"))
    content = read_state_file(path)
    state.step = int(content["step"])
    state.interval = content.get("interval", {})
    state.recent_grad_norms = content.get("recent_grad_norms", [])
    state.ema.start_at(state.step)


def load_newest(store: CheckpointStore, state: TrainState) -> tuple[Path | None, list[str]]:
    """Restore the newest checkpoint that can be read.

    Returns a folder with it, None where there is no checkpoint at all, and a sentence for each damaged one
    passed over. Raises ValueError where all of them are damaged, or one was met that a later program wrote.
    """
    complaints: list[str] = []
    for step in reversed(store.steps()):
        path = store.local(step)
        try:
            load_checkpoint(path, state)
        except UnknownVersionError:
            raise
        except ValueError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    if complaints:
        raise ValueError(
            f"None of the {len(complaints)} checkpoints of this run can be read; the newest: {complaints[0]}"
        )
    return None, complaints


def code_version() -> dict[str, str]:
    """What computed a checkpoint."""
    from importlib.metadata import version

    return {"ditscale": version("ditscale"), "torch": torch.__version__}
