"""A Hydra launcher that runs each run of a sweep in a process of its own, so that its death fails that run alone."""

import atexit
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from hydra import version
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

from launch.command.machine import limit_threads, usable_cores
from launch.command.parallel import PassedOn, started_by_torchrun, stop_without
from train.signals import EX_TEMPFAIL, SIGNALS, StopSignals

TARGET = "hydra_plugins.ditscale.SweepProcesses"  # Hydra accepts only launchers whose name begins with that package

log = logging.getLogger(__name__)


class SweepTask(Protocol):
    """A function that does the job of one run and shows its progress in line ``row`` of the terminal."""

    job: str
    row: int

    def __call__(self, config: DictConfig) -> None:
        """Do the job of a run. Prints what is wrong before it raises."""
        ...

    def name(self, config: DictConfig) -> str:
        """Return the name of a run for messages."""
        ...

    def exit_code(self, error: Exception) -> int:
        """Return the exit code of the process of a run that raised ``error``."""
        ...


class SweepFailedError(Exception):
    """Raised where runs of a sweep failed, after the reason of each was printed."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass
class SweepProcessesConfig:
    """The config section ``hydra.launcher``."""

    _target_: str = TARGET
    n_jobs: int = 1  # number of parallel runs; -1: one per core


def register_launcher() -> None:
    """Register ``hydra/launcher=processes`` with Hydra."""
    ConfigStore.instance().store(group="hydra/launcher", name="processes", node=SweepProcessesConfig)
    Plugins.instance().class_name_to_class[TARGET] = SweepProcesses


@dataclass
class SweepRun:
    """A run of the sweep, with its exit code once it has ended."""

    config: DictConfig
    name: str
    code: int | None = None

    @property
    def failed(self) -> bool:
        """Return whether the process has ended, and neither well nor on request."""
        return self.code not in (None, 0, EX_TEMPFAIL)


@dataclass
class _Origin:
    """The process of the sweep, and the version base that Hydra uses there."""

    pid: int
    hydra_version: str


class SweepProcesses(Launcher):
    """Trains ``n_jobs`` runs of a sweep in parallel, each in a process of its own.

    Under torchrun or on TPU hosts, where a run has several processes, the runs follow one another in the process of the
    sweep instead.
    """

    def __init__(self, n_jobs: int) -> None:
        if n_jobs == 0:
            raise ValueError("hydra.launcher.n_jobs is 0; give the number of parallel runs, or -1 for one per core.")
        cores = usable_cores()
        self._places = n_jobs if n_jobs > 0 else max(1, cores + 1 + n_jobs)
        self._threads = max(1, cores // self._places) if self._places > 1 else None

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        """Keep the context, the task and the config that Hydra passes."""
        self._context, self._config = hydra_context, config
        self._task: SweepTask = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Train all runs.

        Raises `SweepFailedError` at the end where some failed; exits with 75 where some were stopped.
        """
        setup_globals()
        runs = [
            compose_run(self._context, self._config, self._task, list(words), number)
            for number, words in enumerate(job_overrides, initial_job_idx)
        ]
        if any(_stays_together(run.config) for run in runs):
            return self._one_after_another(job_overrides, initial_job_idx)
        signals = PassedOn()
        with signals.watched():  # covers the imports too: some swallow the exception of a Ctrl-C
            self._announce(job_overrides, initial_job_idx)
            method = _start_method()
            if method == "fork":
                _import_ahead(runs[0].config)
            self._train_all(runs, method, signals)
        self._conclude(runs, signals.requested)
        return [JobReturn(overrides=words, status=JobStatus.COMPLETED) for words in job_overrides]

    def _announce(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        Path(self._config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        log.info(f"Launching {len(job_overrides)} runs, {min(self._places, len(job_overrides))} at a time")
        for number, words in enumerate(job_overrides, initial_job_idx):
            log.info(f"\t#{number} : {' '.join(filter_overrides(words))}")

    def _one_after_another(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        launcher = BasicLauncher()
        launcher.setup(hydra_context=self._context, task_function=self._task, config=self._config)
        return launcher.launch(job_overrides, initial_job_idx)

    def _train_all(self, runs: Sequence[SweepRun], method: str, signals: PassedOn) -> None:
        """Start the runs in order, each when a place is free. After a signal, only wait for the runs in progress."""
        waiting, rows = list(reversed(runs)), list(range(self._places))
        training: dict[int, tuple[BaseProcess, SweepRun, int]] = {}
        while training or (waiting and not signals.requested):
            while waiting and rows and not signals.requested:
                run, row = waiting.pop(), rows.pop(0)
                process = self._start(run, row, method)
                training[process.sentinel] = process, run, row
            for sentinel in wait(list(training)):
                assert isinstance(sentinel, int)
                process, run, row = training.pop(sentinel)
                process.join()
                rows = sorted([*rows, row])
                run.code = process.exitcode
                process.close()
                self._report_death(run, signals.requested)

    def _start(self, run: SweepRun, row: int, method: str) -> BaseProcess:
        """Start the process of a run, with signals blocked until the process can handle them."""
        context: Any = multiprocessing.get_context(method)
        origin = _Origin(os.getpid(), str(version.getbase()))
        arguments = (self._task, run.config, self._context, row, self._threads, origin)
        process: BaseProcess = context.Process(target=_train, args=arguments, name=run.name)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process

    def _report_death(self, run: SweepRun, requested: bool) -> None:
        """Print a sentence on a run whose process was killed and could not report the reason itself."""
        assert run.code is not None
        killer = _killer(run.code)
        if killer in SIGNALS and requested:  # a second signal ends processes at once
            run.code = EX_TEMPFAIL
        elif killer == signal.SIGKILL:
            fewer = "train fewer in parallel (hydra.launcher.n_jobs) or " if self._places > 1 else ""
            self._say(
                f"{run.name} failed: its process was killed by SIGKILL (often: the machine ran out of memory); {fewer}"
                "free memory, then give the same command again, which continues it."
            )
        elif killer is not None:
            self._say(f"{run.name} failed: its process was killed by {killer.name}; the same command continues it.")

    def _conclude(self, runs: Sequence[SweepRun], requested: bool) -> None:
        """Report unfinished runs and how to continue them. Raises `SweepFailedError`, or exits with 75 if stopped."""
        if failed := [run for run in runs if run.failed]:
            names = ", ".join(run.name for run in failed)
            sentence = (
                f"{len(failed)} of {len(runs)} runs failed: {names}; the reason of each is given above; once it is "
                "dealt with, the same command continues the run and skips finished ones."
            )
            if not requested:
                raise SweepFailedError(sentence, 2 if failed[0].code == 2 else 1)
            self._say(sentence)
        if requested or any(run.code == EX_TEMPFAIL for run in runs):
            self._say("stopped; the same command continues.")
            sys.exit(EX_TEMPFAIL)

    def _say(self, sentence: str) -> None:
        print(f"ditscale {self._task.job}: {sentence}", file=sys.stderr)


def compose_run(
    context: HydraContext, sweep: DictConfig, task: SweepTask, overrides: list[str], number: int
) -> SweepRun:
    """Return run ``number`` of the sweep whose config is ``sweep``."""
    config: DictConfig = context.config_loader.load_sweep_config(sweep, overrides)
    with open_dict(config):
        config.hydra.job.id = f"{config.hydra.job.name}_{number}"
        config.hydra.job.num = number
    HydraConfig.instance().set_config(config)  # the run's name may refer to Hydra's config
    try:
        return SweepRun(config, task.name(config))
    finally:
        HydraConfig.instance().set_config(sweep)


def _killer(code: int) -> signal.Signals | None:
    """Return the signal that ended a process, also where the process exited by itself on a second signal."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number) if code < 0 or number in SIGNALS else None


def _stays_together(config: DictConfig) -> bool:
    """Return whether a run has other processes besides this one, all of which must be in the same run."""
    if started_by_torchrun() or os.environ.get("WORLD_SIZE", "1") != "1":
        return True
    from runtime.choice import takes_all_devices  # imports PyTorch, which --help does not need

    return takes_all_devices(_chosen(config, "runtime"))


def _chosen(config: DictConfig, place: str) -> Any:
    """Return the component of the section at ``place``, or None if it cannot be imported, which its run reports."""
    name = OmegaConf.select(config, f"{place}._target_")
    try:
        return get_object(str(name)) if name else None
    except Exception:  # Hydra raises several kinds
        return None


def _start_method() -> str:
    """Return the start method: "fork" where that is safe, which saves each run its imports, else "spawn".

    A fork copies no other threads, and CUDA does not work in it if it was initialized here.
    """
    import torch

    alone = threading.active_count() == 1 and not torch.cuda.is_initialized()
    return "fork" if sys.platform == "linux" and alone else "spawn"


def _import_ahead(config: DictConfig) -> None:
    """Import modules here once, before the forks; each run would spend seconds on them."""
    names = ["runtime.accelerate", "torch._dynamo"]
    if config.get("evaluate_every") is not None:
        names.append("launch.report")
    names += getattr(_chosen(config, "logger"), "imports", ())
    for name in names:
        importlib.import_module(name)


def _train(
    task: SweepTask, config: DictConfig, context: HydraContext, row: int, threads: int | None, origin: _Origin
) -> None:
    """Run one run in this process. First reset the signal and exit handlers that a fork has from its parent."""
    atexit._clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignals():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        stop_without(origin.pid)
        if threads is not None:
            limit_threads(threads)
        version.setbase(origin.hydra_version)
        setup_globals()
        task.row = row
        try:
            done = run_job(
                hydra_context=context,
                task_function=task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            if done.status == JobStatus.FAILED:
                sys.exit(task.exit_code(done._return_value))
        finally:
            atexit._run_exitfuncs()  # multiprocessing calls them only since Python 3.13; wandb needs it
