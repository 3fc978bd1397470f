"""The folder of one run, and the rules for continuing it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from data.atomic import append_line, write_bytes
from train.stores import CheckpointStore, FolderStore

# Settings that change neither weights nor losses beyond float rounding. A run may continue with others of these.
FREE_SETTINGS = frozenset(
    {
        "runtime",
        "logger",
        "run_dir",
        "sweep_dir",
        "remote_dir",
        "name",
        "default_name",
        "group",
        "resume",
        "replay",
        "dump_nonfinite",
        "activation_checkpointing",
        "init_from",
        "sampler",
        "guidance",
        "evaluation",
        "sample_every",
        "evaluate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_checkpoint_every",
        "data.shards",
        "data.source",
        "data.samples_per_shard",
        "data.verify_checksums",
        "data.cache",
        "data.cache_bytes",
    }
)


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
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"Another process is training in {self.path}; wait for it, or give this run its own name=..."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def publish(self) -> None:
        """Called when a checkpoint is about to be complete, and at the end. Nothing to do: everything is here."""

    def check(self) -> None:
        """Raise where this folder is no longer this job's."""

    def require(self, config: Mapping[str, Any], allowed: Iterable[str] = ()) -> None:
        """Raise ValueError where a folder with checkpoints holds another config, but for free settings.

        ``allowed`` names further settings that may change; ``batch_size`` never may.
        """
        if self.config.exists() and self.store.steps():
            before = self.read_config()
            _require_same_batch(before.get("batch_size"), config.get("batch_size"), self.path)
            differences = _differences(before, config, FREE_SETTINGS | set(allowed))
            if differences:
                raise ValueError(
                    f"The run folder {self.path} already holds another config: {'; '.join(differences)}; give this "
                    "run its own name=..., or the same settings to continue, or name them in resume.allow=[...]."
                )

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Make this the folder of ``config``; the newest free settings are kept."""
        write_bytes(self.config, yaml.safe_dump(dict(config), sort_keys=False).encode())

    def read_config(self) -> dict[str, Any]:
        """The resolved config. Raises ValueError where it cannot be read."""
        try:
            content = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{self.config} cannot be read ({error}); is {self.path} a run folder?") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.config} holds no config; is {self.path} a run folder?")
        return content

    def append(self, file: Path, record: Mapping[str, Any]) -> None:
        """Add one JSON line to a file of this folder."""
        append_line(file, json.dumps(dict(record)))

    def require_no_lost_checkpoint(self, checkpoint_every: int) -> None:
        """For a run that finds no checkpoint: raise ValueError where its lines say that there was one.

        The first is written beside the steps after it, and is complete before the second begins.
        """
        last = max((line["step"] for line in read_lines(self.metrics)), default=0)
        if last > 2 * checkpoint_every:
            raise ValueError(
                f"{self.path} has results up to step {last} but no checkpoint to continue from; put its checkpoints "
                "back, or move the folder away to train anew."
            )

    def roll_back(self, step: int) -> None:
        """Drop lines of steps after ``step``, and a last line that a crash cut short."""
        for file in (self.metrics, self.timing, self.evaluations):
            if file.exists():
                kept = [json.dumps(line) for line in read_lines(file) if line["step"] <= step]
                write_bytes(file, "".join(line + "\n" for line in kept).encode())

    def retain_checkpoints(self, keep: int, keep_every: int | None = None) -> None:
        """Delete all but the newest ``keep`` and those of the steps that ``keep_every`` divides."""
        for step in self.store.steps()[:-keep]:
            if keep_every is None or step % keep_every:
                self.store.remove(step)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; none where it does not exist. A last line cut by a crash is left out.

    Raises ValueError that names the file and line where another line is damaged.
    """
    if not file.exists():
        return []
    records = []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is empty or cut
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Line {number} of {file} is damaged ({error}); remove that line.") from error
    return records


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
