"""The folder of one run, and the rules for continuing it."""

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
    """``config.yaml``, ``metrics.jsonl``, ``timing.jsonl``, ``evaluations.jsonl``, ``checkpoints/``, ``samples/``.

    A checkpoint is the point of commit: lines that were written after the one that a run continues from
    are taken back, since the run will write them again.
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
        """Where the sample grid of a step lies."""
        return self.samples / f"step_{step:08d}.png"

    def dump(self, step: int) -> Path:
        """What is kept of a step that was not finite."""
        return self.path / f"nonfinite_{step:08d}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other jobs from training here. Raises ValueError where one does; a killed job holds no lock."""
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
        """Called when a checkpoint is about to be complete, and at the end. Nothing to do: everything is here."""

    def check(self) -> None:
        """Raise where this folder is no longer this job's."""

    def require(
        self,
        config: Mapping[str, Any],
        free: Iterable[str] = (),
        allowed: Iterable[str] = (),
        as_now: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        """Raise ValueError where a folder with checkpoints holds another config, but for free settings.

        ``free`` names the settings that change neither weights nor losses beyond rounding, ``allowed`` further ones
        that may change; ``batch_size`` never may. ``as_now`` brings the
        config of an earlier version to today's form.
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
        """Make this the folder of ``config``; the newest free settings are kept."""
        text = (_CONFIG_HEAD + yaml.safe_dump(dict(config), sort_keys=False)).encode()
        write_bytes(self.config, text + f"{_CONFIG_HASH}{hashlib.sha256(text).hexdigest()}\n".encode())

    def read_config(self) -> dict[str, Any]:
        """Return the resolved config. Raises ValueError where it cannot be read, or is not as it was written."""
        try:
            text = read_text(self.config)
            body, mark, expected = text.rpartition(_CONFIG_HASH)
            if mark and hashlib.sha256(body.encode()).hexdigest() != expected.strip():
                raise DamagedFileError("it was changed after it was written")
            if text.startswith(_CONFIG_HEAD) and not mark:  # earlier versions wrote neither
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
        """Add one record to a file of lines of this folder; all but metrics carry a hash."""
        append_record(file, record, sealed=file != self.metrics)

    def lines_so_far(self) -> dict[str, bytes]:
        """Return the results that a checkpoint keeps a copy of, by file name."""
        files = (self.metrics, self.evaluations)
        return {file.name: read_regular(file, MAX_BYTES) for file in files if file.exists()}

    def require_no_lost_checkpoint(self, checkpoint_every: int) -> None:
        """Raise ValueError where a run finds no checkpoint, though its lines say that there was one.

        The first is written beside the steps after it, and is complete before the second begins.
        """
        last = max((line["step"] for line in read_lines(self.metrics)), default=0)
        if last > 2 * checkpoint_every:
            raise ValueError(
                f"{self.path} has results up to step {last} but no checkpoint to continue from; put its checkpoints "
                "back, or move the folder away to train anew."
            )

    def roll_back(self, step: int, copies: Mapping[str, bytes | None] | None = None) -> list[str]:
        """Drop lines of steps after ``step``, and a last line that a crash cut short.

        ``copies`` are the contents of files of lines that the checkpoint of this step has. What the folder has lost of
        them since is put back; returns a sentence for each file that was mended. Raises ValueError where a damaged line
        is in no copy.
        """
        if is_regular(self.evaluations) and self.evaluations.stat().st_size == 0:
            raise ValueError(
                f"{self.evaluations} is empty, and what it held is nowhere else; put it back, or remove it and measure "
                "again."
            )
        notes = []
        if is_regular(self.evaluations) and is_cut(self.evaluations):
            notes.append(
                f"{self.evaluations} ended in the middle of a line, which is taken away; measure again what it held."
            )
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
            if file == self.metrics:  # this run's alone; of evaluations others may have added some since
                added.clear()
            elif damaged > lost.total():
                lines_of(file)  # names the line
            if lost:
                notes.append(f"{file} had lost lines up to step {step}; they are put back from the checkpoint.")
            _keep(file, saved + list(added.elements()))
        return notes

    def retain_checkpoints(self, keep: int, keep_every: int | None = None) -> None:
        """Delete all but the newest ``keep`` and those of the steps that ``keep_every`` divides."""
        for step in self.store.steps()[:-keep]:
            if keep_every is None or step % keep_every:
                self.store.remove(step)


def _keep(file: Path, lines: Sequence[bytes]) -> None:
    """Write these lines; without any there is no file, so that an empty one is known for damage."""
    if not lines:
        return file.unlink(missing_ok=True)
    write_bytes(file, b"".join(line + b"\n" for line in lines))


def _sorted_lines(file: Path) -> tuple[list[Line], int]:
    """Return the lines that can be read, and how many others there are but for a last one that a crash cut short."""
    try:
        *texts, last = read_regular(file, MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return [], 0
    found = [parse_lines(text, str(file)) for text in texts]
    return [*itertools.chain(*found), *parse_lines(last, str(file))], found.count([])


def _config_of(store: CheckpointStore) -> Mapping[str, Any]:
    """Return the config that the newest readable checkpoint carries; an empty one where none can be read."""
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
    """Sentences "key is A there and B now", for settings that are not free."""
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
