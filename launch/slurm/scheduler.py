"""Call SLURM's programs, and keep the sentence with which one of them refuses."""

import re
import shutil
import subprocess
from collections.abc import Sequence

_MAX_ARRAY_SIZE = re.compile(r"^MaxArraySize\s*=\s*(\d+)", re.MULTILINE)


def call(words: Sequence[str]) -> str:
    """Return what a program of SLURM prints.

    Raises ValueError where it is not installed, and with its own sentence where it refuses.
    """
    if shutil.which(words[0]) is None:
        raise ValueError(
            f"There is no {words[0]} on PATH; start the sweep on a login node of a SLURM cluster, or leave out "
            "hydra/launcher=slurm."
        )
    done = subprocess.run(list(words), capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise ValueError(f"{words[0]} refused with exit code {done.returncode}: {said}; correct hydra.launcher.")
    return done.stdout


def max_array_size() -> int:
    """Return the number of tasks that an array may have. SLURM's default is 1,001, whose last index is 1,000."""
    found = _MAX_ARRAY_SIZE.search(call(["scontrol", "show", "config"]))
    return int(found[1]) if found else 1001


def submit(options: Sequence[str], script: str, first: int) -> int:
    """Submit a batch script whose tasks begin with this one, and return the number of its job.

    Raises ValueError where SLURM refuses.
    """
    answer = call(["sbatch", *options, script, str(first)]).strip()
    number = answer.split(";")[0]
    if not number.isdecimal():
        raise ValueError(f"sbatch answered {answer[:80]!r}, which is not the number of a job; is it SLURM's?")
    return int(number)


def unfinished(jobs: Sequence[int]) -> int | None:
    """Return how many tasks of these jobs wait or run, or None where the scheduler did not answer."""
    words = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(map(str, jobs))}"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        return 0 if "Invalid job id" in done.stderr else None  # the scheduler forgets ended jobs
    return len(done.stdout.split())
