"""Jobs are forked from a warm process, two at a time by twins; after a hung job, the next one gets its own status."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_jobs import WarmJobs

LIMIT_SEC = 120.0


@pytest.fixture
def jobs() -> Iterator[WarmJobs]:
    jobs = WarmJobs.importing([])
    yield jobs
    jobs.close()


def _hanging(folder: Path) -> Path:
    """Return a pipe without a reader: a job that prints to it waits before its first line."""
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def test_a_twin_runs_its_job_while_the_job_of_the_other_is_running(jobs: WarmJobs, tmp_path: Path) -> None:
    pipe, twin = _hanging(tmp_path), jobs.twin()
    waiting = jobs.start(["--version"], tmp_path, pipe)
    assert twin.start(["nonsense"], tmp_path, tmp_path / "output").wait(LIMIT_SEC) == 2
    assert waiting.poll() is None
    assert pipe.read_text().startswith("ditscale ")
    assert waiting.wait(LIMIT_SEC) == 0


def test_a_job_that_is_killed_for_its_time_leaves_the_next_its_own_status(jobs: WarmJobs, tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        jobs.start(["--version"], tmp_path, _hanging(tmp_path)).wait(0.1)
    words = ("nonsense", "help")
    codes = [jobs.start([word], tmp_path, tmp_path / "output").wait(LIMIT_SEC) for word in words]
    assert codes == [2, 0]
