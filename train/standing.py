"""Write down how a run stands - running, stopped, failed, done - in its folder, for who looks from another machine."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from core.atomic import write_bytes
from core.records import read_record, seal

if TYPE_CHECKING:  # importing PyTorch takes seconds, which `ditscale status` need not spend
    from train.state import TrainState

FILE = "status.json"
State = Literal["running", "stopped", "failed", "done"]


@dataclass(frozen=True)
class Standing:
    """The content of ``status.json``."""

    state: State
    step: int  # when it was written; `timing.jsonl` has later ones of a run in progress
    total_steps: int
    time_sec: float  # when it was written, since 1970
    reason: str = ""  # of a failure


def read_standing(run_dir: Path) -> Standing | None:
    """Return how a run stands, or None where it has never started. Raises DamagedFileError for a damaged file."""
    try:
        return read_record(run_dir / FILE, Standing)
    except FileNotFoundError:
        return None


@contextmanager
def recorded(run_dir: Path, state: "TrainState", is_main: bool) -> Iterator[None]:
    """Record a run as running within the block, and at its end as done, as stopped, or as failed with its error."""

    def write(standing: State, reason: str = "") -> None:
        if is_main:
            found = Standing(standing, state.step, state.total_steps, time.time(), reason)
            write_bytes(run_dir / FILE, json.dumps(seal(asdict(found))).encode())

    write("running")
    try:
        yield
    except Exception as error:
        write("failed", " ".join(str(error).split()) or type(error).__name__)
        raise
    write("done" if state.finished else "stopped")
