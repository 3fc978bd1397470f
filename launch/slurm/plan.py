"""Write and read the file that tells each task of an array what to run.

The folder ``SWEEP/slurm/TIME-TOKEN/`` belongs to one submission: ``sweep.json``, the marker, the batch script,
``logs/``, and what tasks leave: ``ended/INDEX/RANK`` with the exit code of a process, and ``crashes/INDEX``.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from core.atomic import make_folder, write_bytes
from core.reading import DamagedFileError, read_text
from core.records import read_record, seal

FOLDER, FILE, MARKER, SCRIPT, JOBS = "slurm", "sweep.json", "marker", "batch.sh", "jobs"
_MOST_DIGITS = 4  # of an exit code
_MOST_DIGITS_OF_A_JOB = 12


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep, or a share of an encoding."""

    name: str
    words: list[str]  # of its command line, after ``ditscale JOB``
    run_dir: str | None = None  # its folder; null for a job without one


@dataclass(frozen=True)
class Plan:
    """The runs of one submission, one of each task, by their index."""

    job: str  # train, evaluate or encode
    directory: str  # in which the command was given
    runs: list[PlannedRun]
    shares: int | None = None  # number of tasks that share the only run


def new_folder(sweep_dir: Path, plan: Plan) -> tuple[Path, str]:
    """Write the plan into a new folder below the sweep's, and return the folder and the token in its marker file."""
    token = secrets.token_hex(16)
    folder = sweep_dir.absolute() / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{token[:6]}"
    make_folder(folder / "logs")
    write_bytes(folder / FILE, json.dumps(seal(asdict(plan)), indent=1).encode())
    write_bytes(folder / MARKER, f"{token}\n".encode())
    return folder, token


def read_plan(folder: Path) -> Plan:
    """Return the plan of a submission. Raises OSError, and DamagedFileError where it was changed."""
    return read_record(folder / FILE, Plan)


def submissions(sweep_dir: Path) -> list[Path]:
    """Return the folders of a sweep's submissions, oldest first."""
    return sorted(path.parent for path in (sweep_dir / FOLDER).glob(f"*/{FILE}"))


def write_jobs(folder: Path, jobs: Sequence[int]) -> None:
    """Keep the numbers of a submission's jobs."""
    write_bytes(folder / JOBS, "".join(f"{job}\n" for job in jobs).encode())


def read_jobs(folder: Path) -> list[int]:
    """Return the numbers of a submission's jobs; none where SLURM refused them. Raises DamagedFileError."""
    try:
        words = read_text(folder / JOBS).split()
    except FileNotFoundError:
        return []
    if not all(word.isdecimal() and len(word) < _MOST_DIGITS_OF_A_JOB for word in words):
        raise DamagedFileError(
            f"{folder / JOBS} holds {' '.join(words)[:40]!r}, which are not numbers of jobs; remove it."
        )
    return [int(word) for word in words]


def ended_file(folder: Path, index: int, rank: int) -> Path:
    """Return the file for the exit code of a process."""
    return folder / "ended" / str(index) / str(rank)


def exit_code(folder: Path, index: int) -> int | None:
    """Return the exit code of a task's last start, or None where it has not ended, or died without a word.

    That is the first process's that failed, else that of rank 0. Raises DamagedFileError where a file has no code.
    """
    codes: dict[str, int] = {}
    for path in sorted((folder / "ended" / str(index)).glob("*")):
        text = read_text(path).strip()
        if not (text.isdecimal() and len(text) < _MOST_DIGITS):
            raise DamagedFileError(f"{path} holds {text[:20]!r}, which is not an exit code; remove it.")
        codes[path.name] = int(text)
    failed = [code for code in codes.values() if code in (1, 2)]
    return failed[0] if failed else codes.get("0")
