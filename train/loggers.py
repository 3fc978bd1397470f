"""Send scalars and pictures to Weights & Biases, besides the run folder."""

import hashlib
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from core.atomic import write_bytes
from core.reading import read_text
from core.urls import hidden, redacted_config, secrets_in

if TYPE_CHECKING:
    import wandb

AXES = ("images_seen", "gmacs", "training_gmacs")  # gmacs are the paper's Gflops
OVER_IMAGES_SEEN = (
    "frechet_distance",
    "fid",
    "sfid",
    "inception_score",
    "precision",
    "recall",
    "kid",
    "kernel_distance",
    "recognized_fraction",
    "clip_score",
)
MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # values of WANDB_MODE that wandb accepts


class Logger(Protocol):
    """Receives what a run measures. Created and called on the main process only."""

    imports: ClassVar[tuple[str, ...]]  # modules that it imports when it is created

    @property
    def description(self) -> str:
        """Return the destination in words: "wandb offline"."""
        ...

    def log(self, scalars: Mapping[str, Any]) -> None:
        """Log the scalars of one step, among them step and images_seen."""
        ...

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Log a picture on disk."""
        ...

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Log a table of rows with equal keys."""
        ...

    def log_chart(self, name: str, rows: list[dict[str, Any]], x: str, y: str, title: str) -> None:
        """Log a scatter plot of two columns of a table."""
        ...

    def finish(self) -> None:
        """Flush everything."""
        ...


class NoLogger:
    """Logs nothing, since the run folder has all results. Accepts the arguments of every logger."""

    imports: ClassVar[tuple[str, ...]] = ()
    description = "no wandb"

    def __init__(self, **_: Any) -> None:
        pass

    def log(self, scalars: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Do nothing."""

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Do nothing."""

    def log_chart(self, name: str, rows: list[dict[str, Any]], x: str, y: str, title: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class WandbLogger:
    """Logs to Weights & Biases: online if the user is logged in, else to offline files in ``folder``.

    ``WANDB_MODE`` overrides that choice. The same folder continues the same wandb run (its id is kept in
    ``wandb/id``). Its axis is the logged ``step``, so lines that are logged again after a restart do no harm.
    The run is opened at the first call that logs, so that a finished run that is started again leaves nothing.
    Raises ValueError where WANDB_MODE is not a mode, and at the first call that logs if wandb does not open the run.
    """

    imports: ClassVar[tuple[str, ...]] = ("wandb",)

    def __init__(self, folder: Path, project: str, group: str, name: str, config: Mapping[str, Any], job: str) -> None:
        import wandb  # takes most of a second, which runs without wandb need not spend

        mode = os.environ.get("WANDB_MODE")
        if mode is not None and mode not in MODES:
            raise ValueError(f"WANDB_MODE is {mode!r}, but it must be online, offline or disabled; change or unset it.")
        self._wandb = wandb
        self._folder, self._id_file = folder, folder / "wandb/id"
        if self._id_file.exists():
            self._id()  # raises before anything is trained
        self._secrets = secrets_in(config)
        self._settings: dict[str, Any] = {
            "project": project,
            "group": group,
            "name": name,
            "job_type": job,
            "config": redacted_config(dict(config)),
        }
        self._opened: wandb.Run | None = None

    def _run(self) -> "wandb.Run":
        if self._opened is None:
            try:
                self._opened = self._open()
            except self._wandb.Error as error:
                is_offline = self._mode() in ("offline", "dryrun")  # two names of one mode
                other = "" if is_offline else "WANDB_MODE=offline (which `wandb sync` sends later), or "
                raise ValueError(
                    f"wandb cannot log to this run ({error}); with {other}train/logger=none, the same command "
                    "continues."
                ) from error
            self._opened.define_metric("*", step_metric="step")
            for axis in AXES:
                self._opened.define_metric(axis)
            for metric in OVER_IMAGES_SEEN:
                self._opened.define_metric(metric, step_metric="images_seen")
        return self._opened

    @property
    def description(self) -> str:
        """Return the destination in words, with wandb's mode."""
        return f"wandb {self._mode()}"

    def _mode(self) -> str:
        mode = os.environ.get("WANDB_MODE")
        return mode or ("online" if self._wandb.login(prompt=False, verify=False) else "offline")

    def _open(self) -> "wandb.Run":
        mode = self._mode()
        with _words_without(self._secrets):  # wandb keeps the command line
            return self._wandb.init(
                **self._settings,
                id=self._id(),
                reinit="create_new",  # a sweep's runs may share a process
                resume="allow" if mode == "online" else None,
                mode=mode,  # type: ignore[arg-type]  # checked above
                dir=self._folder.resolve(),  # wandb's service may run in another folder, and relative paths are its own
                settings=self._wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )

    def _id(self) -> str:
        """Return the id of the run's wandb run, kept with its hash. Raises ValueError where the file is damaged."""
        path = self._id_file
        if not path.exists():
            new = secrets.token_hex(8)
            write_bytes(path, f"{new}\n{hashlib.sha256(new.encode()).hexdigest()}\n".encode())
        found, _, hash_ = read_text(path, 1000).strip().partition("\n")
        sound = not hash_ or hashlib.sha256(found.encode()).hexdigest() == hash_  # earlier versions kept the id alone
        if not sound or re.fullmatch(r"[0-9a-f]{16}", found) is None:
            raise ValueError(
                f"{path} does not hold the id of a wandb run; delete it, and the run continues as a new one in wandb."
            )
        return found

    def log(self, scalars: Mapping[str, Any]) -> None:
        """Log one row of the history."""
        self._run().log(dict(scalars))

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Log a picture of a step."""
        self._run().log({name: self._wandb.Image(str(path)), "step": step})

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Log a wandb table."""
        self._run().log({name: self._table(rows)})

    def log_chart(self, name: str, rows: list[dict[str, Any]], x: str, y: str, title: str) -> None:
        """Log a scatter plot of wandb's, which stores the table with it."""
        self._run().log({name: self._wandb.plot.scatter(self._table(rows), x, y, title=title)})

    def finish(self) -> None:
        """Wait until everything is sent or on disk."""
        if self._opened is not None:
            self._opened.finish()

    def _table(self, rows: list[dict[str, Any]]) -> "wandb.Table":
        columns: list[str | int] = list(rows[0])
        return self._wandb.Table(columns=columns, data=[[row[str(column)] for column in columns] for row in rows])


@contextmanager
def _words_without(secrets_of_config: frozenset[str]) -> Iterator[None]:
    """Replace secrets of URLs in this process's command line while the block runs."""
    before = sys.argv
    sys.argv = [hidden(word, secrets_of_config) for word in before]
    try:
        yield
    finally:
        sys.argv = before
