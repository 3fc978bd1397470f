"""Runs that are kept behind a URL."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.atomic import write_bytes
from data.remote import list_tree, read_bytes
from data.remote import write_bytes as send_bytes
from train.lease import Lease
from train.runfolder import RunFolder
from train.stores import FOLDER_NAME, BucketStore, FolderStore, folder_name

LOCK = "lock.json"


class MirroredRunFolder(RunFolder):
    """A run that is kept behind a URL, gs:// or s3://; ``path`` is its working copy, without checkpoints.

    With each checkpoint goes what the folder holds by then, so that any machine can continue from the URL alone.
    What is there wins over what is here. Raises ValueError for a URL that cannot be written to.
    """

    def __init__(self, path: Path, url: str) -> None:
        if not url.startswith(("gs://", "s3://")):
            raise ValueError(f"remote_dir is {url}, but a run is kept behind gs:// or s3:// only; give such a URL.")
        self._url = url.rstrip("/")
        super().__init__(path, BucketStore(f"{self._url}/checkpoints", path / "checkpoints"))
        self._lease = Lease(f"{self._url}/{LOCK}", self._url)
        self._published: dict[str, tuple[int, int]] = {}  # size and time of each file when it was sent

    @contextmanager
    def locked(self) -> Iterator[None]:
        """On this machine and, by a lease, on all others; then fetch what is there."""
        with super().locked(), self._lease.held():
            self._require_no_other_history()
            self._fetch()
            yield

    def publish(self) -> None:
        """Send what has changed since the last time."""
        for file in self._files():
            name, stat = file.relative_to(self.path).as_posix(), file.stat()
            version = (stat.st_size, stat.st_mtime_ns)
            if self._published.get(name) != version:
                send_bytes(f"{self._url}/{name}", file.read_bytes())
                self._published[name] = version

    def check(self) -> None:
        """Raise where another machine has taken the run over."""
        self._lease.check()

    def _files(self) -> list[Path]:
        """Results, pictures and the id of the wandb run; no locks, no checkpoints."""
        found = [*self.path.iterdir(), *self.samples.glob("*.png"), self.path / "wandb/id"]
        return sorted(path for path in found if path.is_file() and not path.name.startswith("."))

    def _fetch(self) -> None:
        for name in _results(self._url):
            write_bytes(self.path / name, read_bytes(f"{self._url}/{name}"))

    def _require_no_other_history(self) -> None:
        here = FolderStore(self.checkpoints).steps()
        if here and not self.store.steps():
            raise ValueError(
                f"{self.path} has checkpoints up to step {here[-1]}, but {self._url} has none; copy them there, or "
                "give this run its own name=..."
            )


def fetch_run(url: str, copies: Path) -> Path:
    """Copy a run, or one of its checkpoints, to a folder below ``copies``; returns the copy of what ``url`` names.

    Of a run come the newest checkpoint and those that are kept for ever, since averages are made of them. Results
    that the copy has already stay as they are. Raises ValueError where there is no run of ours.
    """
    name = url.rstrip("/").rpartition("/")[2]
    is_checkpoint = FOLDER_NAME.fullmatch(name) is not None
    run_url = url.rstrip("/").rpartition("/checkpoints/")[0] if is_checkpoint else url.rstrip("/")
    run = copies / run_url.partition("://")[2]
    store = BucketStore(f"{run_url}/checkpoints", run / "checkpoints")
    wanted = [step for step in store.steps() if not is_checkpoint or folder_name(step) == name]
    if not wanted:
        raise ValueError(f"{url} has no complete checkpoint; give the URL of a run, or of one of its checkpoints.")
    for file in _results(run_url):
        if not (run / file).exists():
            write_bytes(run / file, read_bytes(f"{run_url}/{file}"))
    for step in wanted:
        store.local(step)
    return run / "checkpoints" / name if is_checkpoint else run


def _results(run_url: str) -> list[str]:
    return [name for name in list_tree(run_url) if name != LOCK and not name.startswith("checkpoints/")]
