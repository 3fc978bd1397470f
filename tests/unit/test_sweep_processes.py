"""Processes of a sweep inherit from the process that starts them only what they should."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.command.machine import batch_threads, usable_cores

FORKS = """
import os, sys, threading
import torch
from omegaconf import OmegaConf
import launch.train
from launch.command.sweep_processes import _import_ahead, _start_method

def cuda_is_lost_to_a_fork():
    child = os.fork()
    if child == 0:
        os._exit(torch.cuda._is_in_bad_fork())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

_import_ahead(OmegaConf.create({"evaluate_every": 1, "logger": {"_target_": "no.such"}}))
_import_ahead(OmegaConf.create({"evaluate_every": 1, "logger": "none"}))
assert "wandb" not in sys.modules
_import_ahead(OmegaConf.create({"evaluate_every": 1, "logger": {"_target_": "train.loggers.WandbLogger"}}))
assert "wandb" in sys.modules
assert _start_method() == "fork"
assert not cuda_is_lost_to_a_fork()
torch.cuda.is_available()
assert cuda_is_lost_to_a_fork() == (torch.version.cuda is not None)  # which the assertion before would have seen
thread = threading.Thread(target=threading.Event().wait, daemon=True)
thread.start()
assert _start_method() == "spawn"
"""


def shown_by(program: str) -> str:
    """Return the output of a fresh interpreter, whose libraries choose their number of threads."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, env=env
    ).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks here")
def test_what_a_sweep_imports_starts_no_thread_and_leaves_cuda_to_its_forks() -> None:
    shown_by(FORKS)


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "12800000 100000"}, 128),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_containers_quota_bounds_the_cores_that_a_sweep_uses(
    tmp_path: Path, files: dict[str, str], most: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    here = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == (here if most is None else min(here, most))


@pytest.mark.parametrize(
    ("cores", "environment", "threads"),
    [
        (1, {}, 1),
        (2, {}, 1),
        (4, {}, 3),
        (64, {}, 8),
        (64, {"OMP_NUM_THREADS": "4"}, 3),  # a run of a sweep
        (2, {"OMP_NUM_THREADS": "64"}, 1),
        (4, {"OMP_NUM_THREADS": "4,2"}, 3),
        (64, {"LOCAL_WORLD_SIZE": "16", "OMP_NUM_THREADS": "1"}, 3),  # a process of torchrun
        (2, {"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"}, 1),
        (4, {"LOCAL_WORLD_SIZE": "0"}, 3),  # left over from something else
        (4, {"LOCAL_WORLD_SIZE": "", "OMP_NUM_THREADS": "2"}, 1),
    ],
)
def test_threads_of_batches_leave_a_core_to_the_loop(
    monkeypatch: pytest.MonkeyPatch, cores: int, environment: dict[str, str], threads: int
) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert batch_threads(cores) == threads


LIMITED = """
import torch
from threadpoolctl import threadpool_info
from launch.command.machine import limit_threads
limit_threads(1)
print({library["num_threads"] for library in threadpool_info()} | {torch.get_num_threads()})
"""


def test_runs_that_share_the_cores_compute_with_their_share_of_threads_unless_a_variable_says_how_many() -> None:
    assert shown_by(LIMITED) == "{1}\n"
    shown = shown_by("import os; os.environ['OMP_NUM_THREADS'] = '2'\n" + LIMITED)
    assert shown == f"{{{min(2, len(os.sched_getaffinity(0)))}}}\n"


ASKED = """
import signal, time
from train.signals import ECHO_SEC, StopSignals, ask_to_stop
with StopSignals() as signals:
    ask_to_stop()
    print(signals.requested)
    time.sleep(ECHO_SEC + 0.1)  # a second signal would end the process at once
    with StopSignals():
        ask_to_stop()
    ask_to_stop()
    print("saved", flush=True)
    signal.raise_signal(signal.SIGTERM)
"""


def test_the_death_of_the_parent_asks_a_run_to_stop_and_does_not_cut_off_one_that_was_asked() -> None:
    done = subprocess.run([sys.executable, "-c", ASKED], stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout.split() == ["True", "saved"]
    assert done.returncode == 128 + signal.SIGTERM  # of the second signal that the test itself sends
