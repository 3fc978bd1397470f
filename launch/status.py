"""``ditscale status sweep=FOLDER``: show how each run of a sweep stands, by files alone."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from core.progress import ProgressBar
from core.reading import DamagedFileError
from launch.command.settings import Format, StatusSettings
from launch.jobs import start
from launch.slurm.plan import exit_code, read_plan, submissions
from train.lines import read_lines
from train.standing import FILE, Standing, read_standing


class Task(NamedTuple):
    """The task of a submission to SLURM that runs a run."""

    folder: Path
    number: int

    @property
    def log(self) -> Path:
        """Return the file with its output."""
        return self.folder / "logs" / f"{self.number}.log"


@dataclass(frozen=True)
class RunStatus:
    """The status of a run. Rates and times are those of its last log line."""

    name: str
    state: str  # waiting, running, silent, stopped, failed or done
    step: int = 0
    total_steps: int | None = None
    images_per_sec: float | None = None
    left_sec: float | None = None  # until the last step, by the last step time
    written_sec_ago: float | None = None  # when the run last wrote down a step or a state
    reason: str = ""

    def line(self, width: int) -> str:
        """Return one line of text."""
        parts = [f"{self.name:{width}s}  {self.state:8s}"]
        if self.total_steps is not None:
            parts.append(f"step {self.step:,} of {self.total_steps:,}")
        if self.state == "running" and self.images_per_sec is not None and self.left_sec is not None:
            parts.append(f"{self.images_per_sec:,.0f} images/s, {_duration(self.left_sec)} left")
        if self.state == "silent" and self.written_sec_ago is not None:
            parts.append(f"wrote nothing for {_duration(self.written_sec_ago)}")
        return _printable("  ".join([*parts, self.reason]).rstrip())


def status_job(config: StatusSettings, progress: ProgressBar) -> None:
    """Print a line for each run, then how many are in each state."""
    sweep = Path(config.sweep)
    if "://" in config.sweep:
        raise ValueError(f"sweep is {config.sweep}, but status reads local files; give the folder of the runs.")
    found = list(statuses(sweep, config.silent_min * 60))
    if not found:
        raise ValueError(f"There are 0 runs in {sweep}; give the folder that holds the runs as sweep=FOLDER.")
    if config.format is Format.json:
        for status in found:
            print(json.dumps(asdict(status)))
        return
    width = max(len(status.name) for status in found)
    print("\n".join(status.line(width) for status in found))
    states = [status.state for status in found]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))


def statuses(sweep: Path, silent_sec: float) -> Iterator[RunStatus]:
    """Yield the status of each run that has started in the folder or that was submitted, by name."""
    runs: dict[Path, Task | None] = {path.parent.absolute(): None for path in sweep.glob(f"*/{FILE}")}
    tasks: dict[str, Task] = {}  # of jobs whose runs have no folder, such as encode
    for folder in submissions(sweep):  # the newest counts
        plan = read_plan(folder)
        for index in range(plan.shares or len(plan.runs)):
            run = plan.runs[0 if plan.shares else index]
            if run.run_dir is None:
                tasks[f"{run.name} {index}" if plan.shares else run.name] = Task(folder, index)
            else:
                runs[Path(run.run_dir)] = Task(folder, index)
    for path, task in sorted(runs.items()):
        yield status_of(path, task, silent_sec)
    for name, task in tasks.items():
        yield _of_task(name, task)


def status_of(run_dir: Path, task: Task | None, silent_sec: float) -> RunStatus:
    """Return how the run in a folder stands."""
    try:
        standing = read_standing(run_dir)
        if standing is None:
            return RunStatus(run_dir.name, "waiting") if task is None else _of_task(run_dir.name, task)
        return _of_standing(run_dir, standing, task, silent_sec)
    except (DamagedFileError, ValueError) as error:
        return RunStatus(run_dir.name, "unknown", reason=str(error))


def _of_standing(run_dir: Path, standing: Standing, task: Task | None, silent_sec: float) -> RunStatus:
    of_all = {"name": run_dir.name, "total_steps": standing.total_steps}
    if task is not None and standing.state != "failed" and _has_failed_since(task, run_dir):
        return _of_task(run_dir.name, task)  # which was refused, or died without a word
    if standing.state != "running":
        return RunStatus(state=standing.state, step=standing.step, reason=standing.reason, **of_all)  # type: ignore[arg-type]
    timing = run_dir / "timing.jsonl"
    lines = read_lines(timing)
    written = max(standing.time_sec, timing.stat().st_mtime if lines else 0.0)
    ago = max(0.0, time.time() - written)
    step, rate, left = standing.step, None, None
    if lines and lines[-1]["step"] >= standing.step:
        step, rate = lines[-1]["step"], float(lines[-1]["images_per_sec"])
        left = (standing.total_steps - step) * float(lines[-1]["step_time_sec"])
    state = "silent" if ago > silent_sec else "running"
    return RunStatus(state=state, step=step, images_per_sec=rate, left_sec=left, written_sec_ago=ago, **of_all)  # type: ignore[arg-type]


def _of_task(name: str, task: Task) -> RunStatus:
    """Return how a task stands whose run has not written a state."""
    code = exit_code(task.folder, task.number)
    if code is None:
        return RunStatus(name, "running" if task.log.exists() else "waiting")
    if code == 0:
        return RunStatus(name, "done")
    if code in (1, 2):
        return RunStatus(name, "failed", reason=f"exit code {code}: {_last_error(task.log)}")
    return RunStatus(name, "stopped")


def _has_failed_since(task: Task, run_dir: Path) -> bool:
    """Return whether a task failed after its run last wrote down how it stands."""
    ended = task.folder / "ended" / str(task.number)
    failed = exit_code(task.folder, task.number) in (1, 2)
    return failed and ended.stat().st_mtime > (run_dir / FILE).stat().st_mtime


def _last_error(log: Path) -> str:
    """Return a log's last sentence on an error, else the batch script's last one, else the log's path."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
    except OSError:
        lines = []
    own = [line for line in lines if line.startswith(("ditscale ", "ditscale: "))]
    errors = [line.partition(": error: ")[2] for line in own if ": error: " in line]
    errors = errors or [line.partition(": ")[2] for line in own]
    return errors[-1] if errors else f"see {log}"


def _printable(text: str) -> str:
    """Return a text from files without what would command a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{int(seconds % 60):02d} min"


if __name__ == "__main__":
    start("status")
