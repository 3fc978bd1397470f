"""Store runs behind a URL."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.atomic import write_bytes
from core.names import tree_inside
from core.reading import MAX_RECORD_BYTES
from core.remote import list_sizes, read_bytes
from core.remote import write_bytes as send_bytes
from core.urls import place_of, redacted
from train.lease import Lease
from train.pins import CheckpointGoneError
from train.runfolder import RunFolder
from train.stores import FOLDER_NAME, BucketStore, FolderStore, folder_name

LOCK = "lock.json"
# The files of a run folder besides checkpoints, and the most bytes that each may have.
RESULTS = (
    (re.compile(r"config\.yaml"), 2**24),
    (re.compile(r"(?:metrics|timing|evaluations)\.jsonl"), MAX_RECORD_BYTES),
    (re.compile(r"samples/[^./][^/]*\.png"), 2**28),
    (re.compile(r"wandb/id"), 2**12),
)
ATTEMPTS = 20  # to copy a run whose retention may delete a checkpoint during the copy


class MirroredRunFolder(RunFolder):
    """The folder of a run that is stored behind a URL, gs:// or s3://; ``path`` is a local copy, without checkpoints.

    Each checkpoint is sent with the other files of the folder, so that any machine can continue from the URL alone.
    Files behind the URL replace local ones. Raises ValueError for a URL that is neither gs:// nor s3://.
    """

    def __init__(self, path: Path, url: str) -> None:
        if not url.startswith(("gs://", "s3://")):
            raise ValueError(
                f"remote_dir is {redacted(url)}, but a run is kept behind gs:// or s3:// only; give such a URL."
            )
        self._url = url.rstrip("/")
        tree_inside(path, place_of(self._url), f"remote_dir={redacted(url)}")  # a bucket does not resolve ..
        super().__init__(path, BucketStore(f"{self._url}/checkpoints", path / "checkpoints"))
        self._lease = Lease(f"{self._url}/{LOCK}", self._url)
        self._published: dict[str, tuple[int, int]] = {}  # size and modification time of each file when it was sent

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run on this machine and, by a lease, on all others; then fetch the files behind the URL."""
        with super().locked(), self._lease.held():
            self._require_no_other_history()
            _fetch(self._url, results_of(self._url, self.path), self.path)
            yield

    def publish(self) -> None:
        """Send the files that have changed since the last call."""
        for file in self._files():
            name, stat = file.relative_to(self.path).as_posix(), file.stat()
            version = (stat.st_size, stat.st_mtime_ns)
            if self._published.get(name) != version:
                send_bytes(f"{self._url}/{name}", file.read_bytes())
                self._published[name] = version

    def check(self) -> None:
        """Raise `LeaseLostError` if another machine has taken the run over."""
        self._lease.check()

    def _files(self) -> list[Path]:
        """Return results, pictures and the id of the wandb run, without locks and checkpoints."""
        found = [*self.path.iterdir(), *self.samples.glob("*.png"), self.path / "wandb/id"]
        names = {path: path.relative_to(self.path).as_posix() for path in found if path.is_file()}
        return sorted(path for path, name in names.items() if _limit_of(name) is not None)

    def _require_no_other_history(self) -> None:
        here = FolderStore(self.checkpoints).steps()
        if here and not self.store.steps():
            raise ValueError(
                f"{self.path} has checkpoints up to step {here[-1]}, but {self._url} has none; copy them there, or "
                "give this run its own name=..."
            )


def fetch_run(url: str, copies: Path) -> Path:
    """Copy a run, or one of its checkpoints, to a folder below ``copies``; return the copy of what ``url`` names.

    A run is copied with all its checkpoints, since averages of other widths are made of them; local copies of deleted
    ones are removed. Results that the copy already has are not replaced. Raises ValueError where there is no complete
    checkpoint.
    """
    run_url, is_in_run, name = url.rstrip("/").rpartition("/checkpoints/")
    if not (is_checkpoint := bool(is_in_run) and FOLDER_NAME.fullmatch(name) is not None):
        run_url = url.rstrip("/")
    run = tree_inside(copies, place_of(run_url), redacted(url))
    results = {file: limit for file, limit in results_of(run_url, run).items() if not (run / file).exists()}
    store = BucketStore(f"{run_url}/checkpoints", run / "checkpoints")
    for attempt in range(1, ATTEMPTS + 1):
        wanted = [step for step in store.steps() if not is_checkpoint or folder_name(step) == name]
        if not wanted:
            raise ValueError(
                f"{redacted(url)} has no complete checkpoint; give the URL of a run, or of one of its checkpoints."
            )
        try:
            for step in wanted:
                store.local(step)
            break
        except CheckpointGoneError:
            if is_checkpoint or attempt == ATTEMPTS:
                raise
    _fetch(run_url, results, run)
    if is_checkpoint:
        return run / "checkpoints" / name
    copied = FolderStore(run / "checkpoints")
    for step in set(copied.steps()) - set(wanted):
        copied.remove(step)
    return run


def results_of(run_url: str, run: Path) -> dict[str, int]:
    """Return the names of the result files of a run behind a URL, each with the most bytes it may have.

    Before anything is written, raises UnsafeNameError where the name of any file leads out of the folder ``run``, and
    ValueError for a file that is too large.
    """
    found: dict[str, int] = {}
    for name, size in list_sizes(run_url).items():
        tree_inside(run, name, redacted(run_url))
        if (limit := _limit_of(name)) is None:
            continue
        if size is not None and size > limit:
            raise ValueError(
                f"{redacted(run_url)}/{name} has {size} bytes, but at most {limit} are read of it; is it a run's?"
            )
        found[name] = limit
    return found


def _limit_of(name: str) -> int | None:
    """Return the most bytes that a result may have, or None for a file that is not a result."""
    return next((limit for pattern, limit in RESULTS if pattern.fullmatch(name)), None)


def _fetch(run_url: str, results: dict[str, int], run: Path) -> None:
    for name, limit in results.items():
        write_bytes(run / name, read_bytes(f"{run_url}/{name}", limit_bytes=limit))
