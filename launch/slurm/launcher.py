"""A Hydra launcher that submits the runs of a sweep as one job array of SLURM, or several where one is too small."""

import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from core.atomic import write_bytes
from core.urls import redacted
from launch.command.progress import make_progress
from launch.command.redaction import redact_file
from launch.command.sweep_processes import SweepFailedError, SweepRun, SweepTask, compose_run
from launch.slurm.plan import SCRIPT, Plan, PlannedRun, exit_code, new_folder, read_jobs, submissions, write_jobs
from launch.slurm.scheduler import max_array_size, submit, unfinished
from launch.slurm.script import batch_script, sbatch_options
from launch.slurm.settings import TARGET, SlurmSettings
from train.signals import EX_TEMPFAIL


def register_slurm() -> None:
    """Register ``hydra/launcher=slurm`` with Hydra."""
    ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmSettings)
    Plugins.instance().class_name_to_class[TARGET] = SlurmArray


class SlurmArray(Launcher):
    """Submits each run of a sweep as a task of an array, which continues it after a time limit or preemption."""

    def __init__(self, **settings: Any) -> None:
        self._settings = SlurmSettings(**settings)

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        """Keep the context, the task and the config that Hydra passes."""
        self._context, self._config = hydra_context, config
        self._task: SweepTask = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit all runs; with ``wait``, follow them to their end.

        Raises ValueError where SLURM refuses them, and `SweepFailedError` at the end where some failed; exits with 75
        where some were stopped and not requeued.
        """
        runs = [
            compose_run(self._context, self._config, self._task, list(words), number)
            for number, words in enumerate(job_overrides, initial_job_idx)
        ]
        plan = self._plan(job_overrides, runs)
        sweep_dir = Path(self._config.hydra.sweep.dir)
        _require_none_in_progress(sweep_dir)
        folder, token = new_folder(sweep_dir, plan)
        redact_file(sweep_dir / "multirun.yaml", _values(runs[0].config))
        script = batch_script(self._settings, folder, token, platform.node())
        write_bytes(folder / SCRIPT, script.encode())
        jobs = self._submit(plan, folder)
        write_jobs(folder, jobs)
        print(
            f"Submitted {_count(plan)} tasks as {' and '.join(f'job {job}' for job in jobs)}; their output is in "
            f"{folder / 'logs'}. `ditscale status sweep={sweep_dir}` shows each run, `scancel "
            f"{' '.join(map(str, jobs))}` stops them."
        )
        if self._settings.wait:
            self._follow(plan, folder, jobs)
        return [JobReturn(overrides=words, status=JobStatus.COMPLETED) for words in job_overrides]

    def _plan(self, job_overrides: Sequence[Sequence[str]], runs: Sequence[SweepRun]) -> Plan:
        """Return the plan. Raises ValueError for secrets, and for shares of several runs or of another job."""
        planned = []
        for words, run in zip(job_overrides, runs, strict=True):
            for word in words:
                if redacted(word) != word:
                    raise ValueError(
                        f"{redacted(word)} has a secret, which would be written to a file for the tasks; set it in the "
                        "environment, which SLURM passes on."
                    )
            run_dir = OmegaConf.select(run.config, "run_dir")
            place = None if run_dir is None else str(Path(run_dir).absolute())
            planned.append(PlannedRun(run.name, list(words), place))
        shares = self._settings.shares
        if shares is not None and (self._task.job != "encode" or len(planned) > 1):
            raise ValueError(
                f"hydra.launcher.shares is {shares}, but tasks share the work of 1 encoding, and this is "
                f"{len(planned)} of {self._task.job}; leave it out."
            )
        return Plan(self._task.job, str(Path.cwd()), planned, shares)

    def _submit(self, plan: Plan, folder: Path) -> list[int]:
        """Submit arrays of at most as many tasks as SLURM allows, which share ``max_parallel``."""
        parts = split(_count(plan), max_array_size())
        limits = shared(self._settings.max_parallel, parts)
        name = f"ditscale-{self._task.job}"
        return [
            submit(sbatch_options(self._settings, folder, name, len(part), limit), str(folder / SCRIPT), part.start)
            for part, limit in zip(parts, limits, strict=True)
        ]

    def _follow(self, plan: Plan, folder: Path, jobs: Sequence[int]) -> None:
        """Wait until no task waits or runs, then report as a sweep on one machine does."""
        count = _count(plan)
        with make_progress(self._task.job)("tasks", 0, count, "task") as bar:
            done = 0
            while (left := unfinished(jobs)) != 0:
                now = sum(exit_code(folder, index) == 0 for index in range(count))
                bar.update(now - done)
                bar.note("the scheduler does not answer" if left is None else f"{left} wait or run")
                done = now
                time.sleep(self._settings.poll_sec)
            bar.note("")
            bar.update(sum(exit_code(folder, index) == 0 for index in range(count)) - done)
        codes = {index: exit_code(folder, index) for index in range(count)}
        names = [plan.runs[0 if plan.shares else index].name for index in range(count)]
        failed = [index for index, code in codes.items() if code not in (0, EX_TEMPFAIL)]
        if failed:
            where = ", ".join(f"{names[index]} ({_log(folder, index)})" for index in failed)
            raise SweepFailedError(
                f"{len(failed)} of {count} tasks failed; their output says why: {where}. Once it is dealt with, the "
                "same command continues them and skips finished ones.",
                2 if codes[failed[0]] == 2 else 1,
            )
        if EX_TEMPFAIL in codes.values():
            print(f"ditscale {self._task.job}: stopped; the same command continues.", file=sys.stderr)
            sys.exit(EX_TEMPFAIL)


def _require_none_in_progress(sweep_dir: Path) -> None:
    """Raise ValueError where tasks of an earlier submission wait or run: its runs would be trained twice."""
    for folder in submissions(sweep_dir):
        jobs = read_jobs(folder)
        if jobs and (left := unfinished(jobs)):
            names = " ".join(map(str, jobs))
            raise ValueError(
                f"{left} tasks of job {names}, which were submitted for {sweep_dir}, still wait or run; wait for them, "
                f"or end them by `scancel {names}`."
            )


def split(count: int, most: int) -> list[range]:
    """Return the indices 0 to ``count - 1`` of all tasks in parts of at most ``most``."""
    return [range(first, min(first + most, count)) for first in range(0, count, most)]


def shared(max_parallel: int | None, parts: Sequence[range]) -> list[int | None]:
    """Return how many tasks of each part may run at a time, in sum ``max_parallel``, at least one of each."""
    if max_parallel is None:
        return [None] * len(parts)
    each, more = divmod(max_parallel, len(parts))
    return [max(1, each + (number < more)) for number in range(len(parts))]


def _log(folder: Path, index: int) -> Path:
    """Return the log of a task or, where it could not begin one, the folder, which has SLURM's own."""
    log = folder / "logs" / f"{index}.log"
    return log if log.exists() else log.parent


def _count(plan: Plan) -> int:
    return plan.shares or len(plan.runs)


def _values(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)
