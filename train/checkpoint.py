"""Read checkpoints, which are complete or absent and hold tensors as safetensors, readable without this program.

``step_00000500/`` holds ``model``, ``ema`` and ``optimizer`` ``.safetensors``, one file for each further average, and
``state.json`` with the step, the facts of the run, the hashes of each file and, last, the SHA-256 of its own content.
A large part that several processes wrote has several files, ``ema-00001-of-00004.safetensors``, and an index
``ema.safetensors.index.json`` in the format of Hugging Face's libraries. ``metrics.jsonl`` and ``evaluations.jsonl``
are copies of the run's lines up to the step. `train.saving` writes checkpoints.

A checkpoint may be untrusted, so reading checks that every file is regular and has its recorded hash, that
every name stays inside the folder and that every field has its type. `launch.builders.saved_configs` defines what its
config may build.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.names import UnsafeNameError, inside
from core.reading import DamagedFileError, read_regular, reason
from core.records import parse_object, unseal, validate
from train.checksums import Checksum, Hash32, Hash64, recorded
from train.lines import MAX_BYTES
from train.state import OtherShapeError, TrainState, load_optimizer_tensors
from train.stores import FOLDER_NAME, STATE_FILE, CheckpointStore, step_of
from train.tensor_files import TensorFile, open_tensors

FORMAT_VERSION = 4
# 1: a part is one file; 1 and 2: no hash over state.json, no copies of lines; 1 to 3: SHA-256 of files of tensors
READABLE_VERSIONS = (1, 2, 3, 4)
SEALED_FROM = 3
_PART_OF = re.compile(r"(.+)-\d{5}-of-\d{5}")


def file_names(part: str, owners: Sequence[Sequence[str]]) -> list[str | None]:
    """Return the file in which each process writes its tensors of a part; None for a process without any."""
    writers = [rank for rank, names in enumerate(owners) if names] or [0]
    if len(writers) == 1:
        return [f"{part}.safetensors" if rank in writers else None for rank in range(len(owners))]
    names = {rank: f"{part}-{n:05d}-of-{len(writers):05d}.safetensors" for n, rank in enumerate(writers, start=1)}
    return [names.get(rank) for rank in range(len(owners))]


def index_name(part: str) -> str:
    """Return the name of the index that maps each tensor of a part to its file."""
    return f"{part}.safetensors.index.json"


def part_of(file_name: str) -> str:
    """Return the part that a safetensors file belongs to."""
    stem = file_name.removesuffix(".safetensors")
    match = _PART_OF.fullmatch(stem)
    return match.group(1) if match else stem


@dataclass(frozen=True)
class StateRecord:
    """The fields of ``state.json`` and their types."""

    format_version: int
    step: Annotated[int, Field(ge=0)]
    seed: int
    config: dict[str, Any]
    spec: dict[str, Any]
    data_manifest_hash: str
    sha256: dict[str, Hash64]  # of each other file, by name; since version 4 of the copies of lines only
    blake3: dict[str, Hash64] = field(default_factory=dict)  # of each file of tensors, since version 4
    xxh3_128: dict[str, Hash32] = field(default_factory=dict)  # the same
    code: dict[str, str] = field(default_factory=dict)
    interval: dict[str, list[float]] = field(default_factory=dict)
    recent_grad_norms: list[float] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)  # since version 3


class UnknownVersionError(ValueError):
    """A checkpoint was written by a later version of this program. It is sound, so no older one replaces it."""


def read_state_file(path: Path) -> dict[str, Any]:
    """Return ``state.json`` of a checkpoint folder, with the fields and types of `StateRecord`.

    Raises ValueError where it is missing or damaged, does not match its own hash, or has another step than the folder's
    name, and PermissionError where it may not be read.
    """
    if not path.is_dir():
        raise ValueError(f"There is no checkpoint folder {path}; give one like RUN/checkpoints/step_00000500.")
    file = path / STATE_FILE
    try:
        content = parse_object(read_regular(file), str(file))
        version = content.get("format_version")
        if type(version) is not int:
            raise DamagedFileError(f"it has format version {version!r}")
        content = unseal(content, str(file), required=version in READABLE_VERSIONS and version >= SEALED_FROM)
        if version in READABLE_VERSIONS:
            validate(StateRecord, content, str(file))
            _require_own_step(path, content["step"])
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The checkpoint {path} cannot be read: state.json is missing or damaged ({reason(error, file)}); "
            "use another checkpoint of that run."
        ) from error
    if version not in READABLE_VERSIONS:
        raise UnknownVersionError(
            f"The checkpoint {path} has format version {version}, but this program reads versions "
            f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}; use the program that wrote it."
        )
    return content


def _require_own_step(path: Path, step: int) -> None:
    if FOLDER_NAME.fullmatch(path.name) and step_of(path) != step:
        raise DamagedFileError(f"it has step {step}, but is in {path.name}")


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of the part ``name`` on the CPU. Raises ValueError that names the file if one is damaged."""
    hashes = recorded(read_state_file(path))
    tensors: dict[str, Tensor] = {}
    for file_name in _files_of(path, hashes, name):
        file = _sound_file(path, file_name, hashes[file_name])
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file ({error}).") from error
    return tensors


def _files_of(path: Path, hashes: Iterable[str], name: str) -> list[str]:
    parts = {file_name: part_of(file_name) for file_name in hashes if file_name.endswith(".safetensors")}
    files = [file_name for file_name, part in parts.items() if part == name]
    if not files:
        weights = ", ".join(dict.fromkeys(part for part in parts.values() if part != "optimizer"))
        raise ValueError(f"The checkpoint {path} has no weights {name!r}; it has {weights}.")
    return files


def read_lines_copy(path: Path, name: str) -> bytes | None:
    """Return a checkpoint's copy of a JSON Lines file, up to its step; None where the checkpoint has no copy.

    Raises ValueError that names the copy if it is damaged.
    """
    expected = recorded(read_state_file(path)).get(name)
    return None if expected is None else read_regular(_sound_file(path, name, expected), MAX_BYTES)


def _sound_file(path: Path, file_name: str, expected: Checksum) -> Path:
    """Return the path of a checkpoint's file. Raises ValueError that names it unless it has the expected hash."""
    with _faults_named(path, file_name):
        file = inside(path, file_name, str(path / STATE_FILE))
        found = expected.found_in(file)
    _require_hash(path, file_name, expected, found)
    return file


@contextmanager
def _faults_named(path: Path, file_name: str) -> Iterator[None]:
    """Raise ValueError that names the checkpoint where a file of it is missing or is not a regular file inside it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"The checkpoint {path} has no {file_name}; use another checkpoint of that run.") from error
    except (UnsafeNameError, DamagedFileError) as error:
        raise ValueError(f"The checkpoint {path} is damaged: {error} Use another checkpoint of that run.") from error


def _require_hash(path: Path, file_name: str, expected: Checksum, found: str) -> None:
    if found != expected.value:
        raise ValueError(
            f"The checkpoint {path} is damaged: {file_name} should have {expected.algorithm} {expected.value}, but has "
            f"{found}; use another checkpoint of that run."
        )


@dataclass(frozen=True)
class _Reading:
    """A file of a checkpoint, the tensors that it is read into, and the hash that it must have."""

    path: Path  # of the checkpoint
    file_name: str
    file: TensorFile
    tensors: dict[str, Tensor]
    expected: Checksum

    def run(self) -> None:
        """Fill the tensors. Raises ValueError, once they are filled, where the file is damaged."""
        with _faults_named(self.path, self.file_name):
            found = self.file.read_into(self.tensors, self.expected)
        _require_hash(self.path, self.file_name, self.expected, found)


def _readings(
    path: Path, content: Mapping[str, Any], name: str, targets: Mapping[str, Tensor] | None
) -> list[_Reading] | None:
    """Plan to read a part into ``targets``, contiguous tensors on the CPU, or into new tensors.

    Returns None where a file does not have the form that `write_tensors` gives it, or where its tensors are not exactly
    the targets: another reader must say why. Raises ValueError where a file is missing or not a regular file.
    """
    readings: list[_Reading] = []
    hashes = recorded(content)
    with ExitStack() as opened:  # closes them where they are not read
        for file_name in _files_of(path, hashes, name):
            with _faults_named(path, file_name):
                file = open_tensors(inside(path, file_name, str(path / STATE_FILE)))
            opened.callback(file.close)
            if (tensors := _targets_of(file, targets)) is None:
                return None
            fast = content.get("xxh3_128", {}).get(file_name)
            expected = hashes[file_name] if fast is None else Checksum("xxh3_128", fast)
            readings.append(_Reading(path, file_name, file, tensors, expected))
        found = [name for reading in readings for name in reading.tensors]
        if targets is not None and sorted(found) != sorted(targets):
            return None
        opened.pop_all()
        return readings


def _targets_of(file: TensorFile, targets: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return the tensors that a file is read into: new ones, or its share of ``targets``; None where none fit."""
    if (described := file.described()) is None:  # the file is at least as large as what is allocated here
        return None
    if targets is None:
        return {name: torch.empty(value.shape, dtype=value.dtype) for name, value in described.items()}
    fitting = {
        name: targets[name] for name, value in described.items() if name in targets and _fits(targets[name], value)
    }
    return fitting if len(fitting) == len(described) else None


def _fits(target: Tensor, value: Tensor) -> bool:
    same = (target.dtype, target.shape, target.device.type) == (value.dtype, value.shape, "cpu")
    return same and target.is_contiguous()


def load_weights(module: nn.Module, path: Path, name: str) -> None:
    """Load ``model`` weights or an average. Raises ValueError for a damaged file or a different architecture."""
    fill(module, path, read_tensors(path, name))


def fill(module: nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint's weights into a module. Raises ValueError where their architecture differs."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"The checkpoint {path} is of another model than the config: {error}") from error


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Restore the whole training state in place. Each file is mapped, copied and hashed in one pass.

    Raises ValueError for a damaged checkpoint; part of the state is then the checkpoint's, and another must replace it.
    """
    content = read_state_file(path)
    modules: dict[str, nn.Module] = {"model": state.model, **state.ema.modules}
    of_modules = {name: _readings(path, content, name, module.state_dict()) for name, module in modules.items()}
    of_optimizer = _readings(path, content, "optimizer", targets=None)
    _run([reading for readings in (*of_modules.values(), of_optimizer) for reading in readings or ()])
    for name, module in modules.items():
        if of_modules[name] is None:
            load_weights(module, path, name)
    if of_optimizer is None:
        tensors = read_tensors(path, "optimizer")
    else:
        tensors = {name: value for reading in of_optimizer for name, value in reading.tensors.items()}
    try:
        load_optimizer_tensors(state.model, state.optimizer, tensors)
    except OtherShapeError as error:
        raise ValueError(f"The checkpoint {path} is of another model than the config: {error}") from error
    state.step = int(content["step"])
    state.interval = content.get("interval", {})
    state.recent_grad_norms = content.get("recent_grad_norms", [])
    state.ema.start_at(state.step)


def _run(readings: Sequence[_Reading]) -> None:
    """Read all files, on as many threads as PyTorch uses. Raises the error of the first that has one."""
    if (threads := min(torch.get_num_threads(), len(readings))) <= 1:
        for reading in readings:
            reading.run()
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="load") as pool:
        by_size = sorted(readings, key=lambda reading: -reading.file.size)
        started = {reading.file_name: pool.submit(reading.run) for reading in by_size}
        for reading in readings:
            started[reading.file_name].result()


def load_newest(store: CheckpointStore, state: TrainState) -> tuple[Path | None, list[str]]:
    """Restore the newest checkpoint that can be read.

    Returns its folder, or None where there is no checkpoint at all, and one sentence for each damaged checkpoint that
    was skipped. Raises ValueError where all are damaged, or where a later version of this program wrote one.
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
    """Return the versions of the packages that compute a checkpoint."""
    from importlib.metadata import version

    return {"ditscale": version("ditscale"), "torch": torch.__version__}
