"""A run that is asked to stop saves, exits with the code that requests a requeue, and continues to the same bits."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import TINY_RUN, InProcess, command, ditscale, json_lines, warm
from test_processes import wait_for
from warm_jobs import TRAINING, WarmJob
from warm_torchrun import ranks_of, start_torchrun

from train.stores import list_checkpoints, step_of

STEPS = "total_steps=60"
LAST = "checkpoints/step_00000060"
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def words(digits: Path) -> list[str]:
    return [*TINY_RUN, f"data.shards={digits}", "run_dir=run", STEPS, "log_every=7", "checkpoint_every=20"]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    ditscale("train", *words, cwd=folder)
    return folder / "run"


def start(words: list[str], cwd: Path, is_fresh: bool = False) -> subprocess.Popen[bytes] | WarmJob:
    """Start ``ditscale WORDS``, in a fresh interpreter or forked from one that has imported what jobs import."""
    if not is_fresh:
        return warm(*TRAINING).start(words, cwd, cwd / "log")
    with (cwd / "log").open("a") as log:
        return subprocess.Popen(command(*words), cwd=cwd, stdout=log, stderr=log)


def same_run(run: Path, whole: Path, last: str = LAST) -> None:
    for name in FILES:
        assert (run / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_exits_with_75_and_the_same_command_ends_with_the_same_bits(
    whole: Path, words: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    job = start(["train", *words], tmp_path, is_fresh=number == signal.SIGTERM)
    wait_for(tmp_path / "run/checkpoints/step_00000020", job)
    job.send_signal(number)
    assert job.wait(60) == 75, (tmp_path / "log").read_text()
    stopped_at = step_of(list_checkpoints(tmp_path / "run/checkpoints")[-1])
    assert f"stopped and saved at step {stopped_at}; the same command continues" in (tmp_path / "log").read_text()
    assert 20 <= stopped_at <= 60
    ditscale("train", *words, cwd=tmp_path)
    same_run(tmp_path / "run", whole)


def test_a_signal_during_an_evaluation_ends_it_and_the_same_command_makes_it_up(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    """Send the signal at a step that has no checkpoint of its own."""
    words = [*TINY_RUN, f"data.shards={digits}", "total_steps=20", "sample_every=15", "evaluate_every=15"]
    words += ["sampler.steps=25", "evaluation.num_images=400", "evaluation.batch_size=20"]
    words += ["evaluation.features.epochs=1", f"evaluation.cache={tmp_path / 'cache'}"]
    in_process("train", *words, "run_dir=whole")
    job = start(["train", *words, "run_dir=run"], tmp_path)
    run, whole = tmp_path / "run", tmp_path / "whole"
    wait_for(run / "samples/step_00000015.png", job)  # drawn before the step is measured
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75, (tmp_path / "log").read_text()
    assert step_of(list_checkpoints(run / "checkpoints")[-1]) == 15
    assert not (run / "evaluations.jsonl").exists()
    in_process("train", *words, "run_dir=run")
    for name in FILES:
        last = f"checkpoints/step_00000020/{name}"
        assert (run / last).read_bytes() == (whole / last).read_bytes(), name
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert json_lines(run / "evaluations.jsonl") == json_lines(whole / "evaluations.jsonl")


def test_a_second_signal_leaves_at_once_and_loses_nothing_that_was_saved(
    whole: Path, words: list[str], tmp_path: Path
) -> None:
    job = start(["train", *words, "data.verify_checksums=true"], tmp_path)
    wait_for(tmp_path / "run/checkpoints/step_00000020", job)
    os.kill(job.pid, signal.SIGSTOP)  # else it would be through before the second signal
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGCONT)
    while "a second signal stops at once" not in (tmp_path / "log").read_text() and job.poll() is None:
        time.sleep(0.001)
    with suppress(ProcessLookupError):  # it may be through
        os.kill(job.pid, signal.SIGSTOP)
    time.sleep(1.2)  # a signal that comes sooner is an echo of the first
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGCONT)
    assert job.wait(60) in (75, 128 + signal.SIGTERM)
    ditscale("train", *words, cwd=tmp_path)
    same_run(tmp_path / "run", whole)


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_log_step(words: list[str], tmp_path: Path) -> None:
    job = start_torchrun(2, "train", *words, "total_steps=100000", cwd=tmp_path, output=tmp_path / "log")
    wait_for(tmp_path / "run/checkpoints/step_00000020", job)
    workers = ranks_of(job)
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGTERM)
    assert job.wait() == 1  # of torchrun, which names its workers' own code
    shown = (tmp_path / "log").read_text()
    assert shown.count("exitcode  : 75") == 2 or shown.count(": 75 ") >= 1, shown
    stopped_at = step_of(list_checkpoints(tmp_path / "run/checkpoints")[-1])
    assert stopped_at % 7 == 0
    assert json_lines(tmp_path / "run/metrics.jsonl")[-1]["step"] == stopped_at


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_a_parallel_sweep_stops_its_workers_when_they_have_saved(
    words: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    """Send SIGKILL only to the process that started the workers."""
    sweep = [word for word in words if word != "run_dir=run"] + ["seed=0,1", "model.patch_size=4", "model.width=16"]
    words = ["train", "-m", *sweep, "total_steps=100000", "hydra.launcher.n_jobs=2"]
    job = start(words, tmp_path, is_fresh=number == signal.SIGTERM)
    runs = [tmp_path / f"runs/demo/d16-n2-p4-adaln_zero-seed{seed}" for seed in (0, 1)]
    for run in runs:
        wait_for(run / "checkpoints/step_00000020", job)
    workers = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(number)
    assert job.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 75)
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    shown = (tmp_path / "log").read_text()
    for run in runs:
        stopped_at = step_of(list_checkpoints(run / "checkpoints")[-1])
        assert f"{run.relative_to(tmp_path)}: stopped and saved at step {stopped_at}; the same" in shown
