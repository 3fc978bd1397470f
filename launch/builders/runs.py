"""Read the checkpoints that a setting names while they are pinned, so that a run in progress does not delete them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from core.reading import sha256_of
from core.remote import is_remote
from train import posthoc
from train.mirror import fetch_run
from train.pins import STATE_FILE, CheckpointGoneError, pinned
from train.stores import list_checkpoints

Result = TypeVar("Result")

COPIES = Path("cache/runs")  # copies of runs that are read from a URL
ATTEMPTS = 20  # at reading the newest checkpoint of a run that deletes it meanwhile


def read_checkpoint(where: str, read: Callable[[Path], Result]) -> Result:
    """Return the result of ``read`` for a checkpoint's folder: a run's newest checkpoint, or ``where`` itself.

    A run may delete its newest checkpoint before it is pinned, or at any time where the file system does not support
    pins; then the newest one that exists is read instead. Raises what ``read`` raises for a checkpoint that exists, and
    ValueError for one that does not.
    """
    for _ in range(ATTEMPTS):
        path = checkpoint_path(where)
        before = _identity(path)
        try:
            with pinned(path):
                return read(path)
        except (OSError, ValueError) as error:
            is_there, is_named = before is not None and _identity(path) == before, path == Path(where)
            if is_there or (is_named and before is None):
                raise
            if is_named:
                raise CheckpointGoneError(f"The checkpoint {path} was deleted while it was read.") from error
    raise CheckpointGoneError(
        f"The run {where} deleted its newest checkpoint {ATTEMPTS} times while it was read; train it with a larger "
        "keep_checkpoints, or give the folder of a checkpoint that is kept."
    )


def checkpoint_path(where: str) -> Path:
    """Return the folder of a run's newest checkpoint, or ``where`` itself. A run at a URL is first copied locally."""
    path = fetch_run(where, COPIES) if is_remote(where) else Path(where)
    if (path / "checkpoints").is_dir():
        complete = list_checkpoints(path / "checkpoints")
        if not complete:
            raise ValueError(f"The run {where} has no complete checkpoint yet; train it further.")
        return complete[-1]
    return path


@contextmanager
def pinned_sources(path: Path, weights: str) -> Iterator[Sequence[Path]]:
    """Pin the checkpoints from which weights of this name are computed, and yield their folders.

    For ``width_W`` these are the run's checkpoints up to ``path``, else ``path`` alone, which is pinned already. A
    checkpoint that is deleted meanwhile is left out.
    """
    if not weights.startswith(posthoc.PREFIX):
        yield [path]
        return
    with ExitStack() as pins:
        found = []
        for other in list_checkpoints(path.parent):
            if other.name < path.name:
                with suppress(CheckpointGoneError):
                    pins.enter_context(pinned(other))
                    found.append(other)
        yield [*found, path]


def checkpoint_hash(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's ``state.json``, which has the hashes of its other files."""
    return sha256_of(path / STATE_FILE)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a folder, which differ for a later one of that name, or None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
