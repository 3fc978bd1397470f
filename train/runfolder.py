"""Define the folder of one run, and the rules for continuing it."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from core.atomic import write_bytes
from core.locks import HeldError, acquired
from core.reading import DamagedFileError, is_regular, read_regular, read_text, reason
from train.checkpoint import read_state_file
from train.lines import MAX_BYTES, Line, append_record, is_cut, lines_of, parse_lines, read_lines
from train.stores import CheckpointStore, FolderStore

_CONFIG_HEAD = "# The resolved config of a run; the last line has its hash.\n"
_CONFIG_HASH = "# sha256 of the lines above: "  # last line of config.yaml


class RunFolder:
    """The folder of a run: its ``config.yaml``, JSON Lines files, ``checkpoints/`` and ``samples/``.

    A checkpoint is the point of commit: lines that were written after the checkpoint that a run continues from are
    removed, since the run will write them again.
    """

    def __init__(self, path: Path, store: CheckpointStore | None = None) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.timing = path / "timing.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.store: CheckpointStore = store or FolderStore(self.checkpoints)

    def grid(self, step: int) -> Path:
        """Return the path of the sample grid of a step."""
        return self.samples / f"step_{step:08d}.png"

    def dump(self, step: int) -> Path:
        """Return the folder of the dump of a step that was not finite."""
        return self.path / f"nonfinite_{step:08d}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other jobs from training here. Raises ValueError if one does; a killed job holds no lock."""
        try:
            lock = acquired(self.path / ".lock", timeout_sec=0)
        except HeldError as error:
            raise ValueError(
                f"Another process is training in {self.path}; wait for it, or give this run a name=... of its "
                f"own{error.hint}."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def publish(self) -> None:
        """Do nothing: the folder is local. Called before a checkpoint is complete, and at the end."""

    def check(self) -> None:
        """Raise if another job has taken this folder over; a local folder is locked, so do nothing."""

    def require(
        self,
        config: Mapping[str, Any],
        free: Iterable[str] = (),
        allowed: Iterable[str] = (),
        as_now: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        """Raise ValueError where a folder with checkpoints has another config, apart from free settings.

        ``free`` names the settings that change neither weights nor losses beyond rounding, ``allowed`` further ones
        that may change; ``batch_size`` never may. ``as_now`` converts the config of an earlier version to today's form.
        """
        if self.store.steps():
            before = self.read_config() if self.config.exists() else _config_of(self.store)
            _require_same_batch(before.get("batch_size"), config.get("batch_size"), self.path)
            differences = _differences(as_now(before), config, {*free, *allowed})
            if differences:
                raise ValueError(
                    f"The run folder {self.path} already holds another config: {'; '.join(differences)}; give this "
                    "run its own name=..., or the same settings to continue, or name them in resume.allow=[...]."
                )

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config`` with its hash; free settings take their newest values."""
        text = (_CONFIG_HEAD + yaml.safe_dump(dict(config), sort_keys=False)).encode()
        write_bytes(self.config, text + f"{_CONFIG_HASH}{hashlib.sha256(text).hexdigest()}\n".encode())

    def read_config(self) -> dict[str, Any]:
        """Return the resolved config. Raises ValueError where it cannot be read or was changed since it was written."""
        try:
            text = read_text(self.config)
            body, mark, expected = text.rpartition(_CONFIG_HASH)
            if mark and hashlib.sha256(body.encode()).hexdigest() != expected.strip():
                raise DamagedFileError("it was changed after it was written")
            if text.startswith(_CONFIG_HEAD) and not mark:  # earlier versions wrote neither head nor hash
                raise DamagedFileError("it is cut short")
            content = yaml.safe_load(text)
        except (OSError, DamagedFileError, yaml.YAMLError, RecursionError, ValueError) as error:
            what = " ".join(reason(error, self.config).split())[:300]
            raise ValueError(
                f"{self.config} cannot be read ({what}); is {self.path} a run folder? A run's checkpoints have its "
                "config too: without this file, the same training command writes it again."
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.config} holds no config; is {self.path} a run folder?")
        return content

    def append(self, file: Path, record: Mapping[str, Any]) -> None:
        """Append one record to a JSON Lines file of this folder; lines of all but metrics carry a hash."""
        append_record(file, record, sealed=file != self.metrics)

    def lines_so_far(self) -> dict[str, bytes]:
        """Return the contents that a checkpoint stores a copy of, by file name."""
        files = (self.metrics, self.evaluations)
        return {file.name: read_regular(file, MAX_BYTES) for file in files if file.exists()}

    def require_no_lost_checkpoint(self, checkpoint_every: int) -> None:
        """Raise ValueError for a run without checkpoints whose lines show that there was one.

        The first checkpoint is written asynchronously, and is complete before the second save begins.
        """
        last = max((line["step"] for line in read_lines(self.metrics)), default=0)
        if last > 2 * checkpoint_every:
            raise ValueError(
                f"{self.path} has results up to step {last} but no checkpoint to continue from; put its checkpoints "
                "back, or move the folder away to start over."
            )

    def roll_back(self, step: int, copies: Mapping[str, bytes | None] | None = None) -> list[str]:
        """Remove lines of steps after ``step``, and a last line that a crash cut short.

        ``copies`` are the contents of JSON Lines files in the checkpoint of this step. Lines that the folder has lost
        since are restored from them; returns a sentence for each repaired file. Raises ValueError where a damaged line
        is in no copy.
        """
        if is_regular(self.evaluations) and self.evaluations.stat().st_size == 0:
            raise ValueError(
                f"{self.evaluations} is empty, and no other file has its content; restore it, or remove it and measure "
                "again."
            )
        notes = []
        if is_regular(self.evaluations) and is_cut(self.evaluations):
            notes.append(f"{self.evaluations} ended in the middle of a line, which is removed; repeat its evaluation.")
        for file in (self.metrics, self.timing, self.evaluations):
            copy = (copies or {}).get(file.name)
            if copy is None:
                if file.exists():
                    _keep(file, [line.text for line in lines_of(file) if line.record["step"] <= step])
                continue
            saved = [line.text for line in parse_lines(copy, f"the checkpoint's {file.name}")]
            sound, damaged = _sorted_lines(file)
            present = Counter(line.text for line in sound if line.record["step"] <= step)
            lost, added = Counter(saved) - present, present - Counter(saved)
            if file == self.metrics:  # written by this run alone; other jobs may have appended evaluations since
                added.clear()
            elif damaged > lost.total():
                lines_of(file)  # raises an error that names the damaged line
            if lost:
                notes.append(f"{file} had lost lines up to step {step}; they are restored from the checkpoint.")
            _keep(file, saved + list(added.elements()))
        return notes

    def retain_checkpoints(self, keep: int, keep_every: int | None = None) -> None:
        """Delete all but the newest ``keep`` checkpoints and those whose step is a multiple of ``keep_every``."""
        for step in self.store.steps()[:-keep]:
            if keep_every is None or step % keep_every:
                self.store.remove(step)


def _keep(file: Path, lines: Sequence[bytes]) -> None:
    """Write these lines, or delete the file if there are none, so that an empty file is always a damaged one."""
    if not lines:
        return file.unlink(missing_ok=True)
    write_bytes(file, b"".join(line + b"\n" for line in lines))


def _sorted_lines(file: Path) -> tuple[list[Line], int]:
    """Return the readable lines and the number of damaged ones, not counting a last line that a crash cut short."""
    try:
        *texts, last = read_regular(file, MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return [], 0
    found = [parse_lines(text, str(file)) for text in texts]
    return [*itertools.chain(*found), *parse_lines(last, str(file))], found.count([])


def _config_of(store: CheckpointStore) -> Mapping[str, Any]:
    """Return the config of the newest readable checkpoint, or an empty one where no checkpoint is readable."""
    for step in reversed(store.steps()):
        with suppress(ValueError):
            config: Mapping[str, Any] = read_state_file(store.local(step))["config"]
            return config
    return {}


def _require_same_batch(before: int | None, now: int | None, path: Path) -> None:
    if before != now:
        raise ValueError(
            f"batch_size is {before} in the run folder {path} and {now} now, but a run's position in the data is "
            f"step x batch_size, and another one would skip or repeat samples; keep {before} (the number of processes "
            "and runtime.micro_batches may change, the order stays exact), or start a new run with init_from."
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Iterable[str], prefix: str = "") -> list[str]:
    """Return a clause "key is A there and B now" for each setting that differs and is not free."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        name = f"{prefix}{key}"
        if name in free:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, free, f"{name}.")
        elif before != after:
            found.append(f"{name} is {before!r} there and {after!r} now")
    return found
