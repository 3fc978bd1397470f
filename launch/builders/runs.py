"""The checkpoints that a setting names, read while they are pinned: retention of a run that goes on waits for that."""

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

COPIES = Path("cache/runs")  # of runs that are read from a URL
ATTEMPTS = 20  # to read the newest checkpoint of a run that deletes it meanwhile


def read_checkpoint(where: str, read: Callable[[Path], Result]) -> Result:
    """Return what ``read`` makes of a checkpoint's folder: of the newest of a run, or of ``where`` itself.

    Where the newest is deleted before it is pinned, or no pins hold on that file system, the next newest is read.
    Raises what ``read`` raises of a checkpoint that is there, and ValueError for one that is not.
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
        "keep_checkpoints, or give the folder of one that stays."
    )


def checkpoint_path(where: str) -> Path:
    """A checkpoint's folder, of a run or of itself, which is copied to this machine where it is behind a URL."""
    path = fetch_run(where, COPIES) if is_remote(where) else Path(where)
    if (path / "checkpoints").is_dir():
        complete = list_checkpoints(path / "checkpoints")
        if not complete:
            raise ValueError(f"The run {where} has no complete checkpoint yet; train it further.")
        return complete[-1]
    return path


@contextmanager
def pinned_sources(path: Path, weights: str) -> Iterator[Sequence[Path]]:
    """Pin the checkpoints that weights of this name are made of: the run's up to this one, or this one alone.

    Of several it is only for ``width_W``. ``path`` itself is pinned already; one that is deleted just now is left out.
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
    """Return the SHA-256 of its ``state.json``, which holds the hashes of its other files."""
    return sha256_of(path / STATE_FILE)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the identity of a folder, another in its place has another; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
