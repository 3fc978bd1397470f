"""Several processes train the same run as one, and a killed run continues as if nothing had happened."""

import ctypes
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import TINY_RUN, ditscale, json_lines, warm
from filelock import FileLock
from safetensors.torch import load_file
from warm_jobs import TRAINING, WarmJob
from warm_python import TRAINING as MODULES
from warm_python import WarmProcesses, run_ranks, run_warm_python, start_ranks
from warm_torchrun import ranks_of, start_torchrun

from train.stores import list_checkpoints, step_of

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
NEWEST = "checkpoints/step_00000040"


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("model", "ema", "optimizer"):
        found |= {f"{name}/{key}": value for key, value in load_file(run / NEWEST / f"{name}.safetensors").items()}
    return found


@pytest.fixture(scope="module")
def whole_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    ditscale("train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def run_of_two(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, "train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", cwd=folder)
    return folder / "run"


def test_two_processes_train_the_same_run_as_one(whole_run: Path, run_of_two: Path) -> None:
    alone, together = json_lines(whole_run / "metrics.jsonl"), json_lines(run_of_two / "metrics.jsonl")
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    for one, two in zip(alone, together, strict=True):
        for key in ("loss", "mse", "vlb", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), (one["step"], key)
    assert together[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-6)
    one_weights, two_weights = weights(whole_run), weights(run_of_two)
    for name, value in one_weights.items():
        np.testing.assert_allclose(two_weights[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_two_processes_draw_the_same_as_one_by_another_generator(digits: Path, tmp_path: Path) -> None:
    words = ["train", *TINY_RUN, f"data.shards={digits}", "generator=philox32_v1", "total_steps=5"]
    ditscale(*words, "run_dir=one", cwd=tmp_path)
    run_ranks(2, *words, "run_dir=two", cwd=tmp_path)
    (alone,), (together,) = json_lines(tmp_path / "one/metrics.jsonl"), json_lines(tmp_path / "two/metrics.jsonl")
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)


MEANS = """
import torch
from runtime.accelerate import AccelerateRuntime
runtime = AccelerateRuntime("fp32", device="cpu")
own = torch.rand((), generator=torch.Generator().manual_seed(runtime.data_rank))
values = runtime.fetch([{"loss": own}] * 5 + [{"loss": own, "grad_norm": own}] * 5)
assert len({*values["loss"], *values["grad_norm"]}) == 1, values
"""


def test_a_metrics_mean_over_processes_is_the_same_wherever_it_stands_among_others(tmp_path: Path) -> None:
    """Else the lines would change where a checkpoint reads the metrics of half an interval."""
    run_warm_python(MODULES, "-c", MEANS, cwd=tmp_path, ranks=4)


def test_two_killed_processes_end_with_the_bits_of_two_that_were_not(
    run_of_two: Path, digits: Path, tmp_path: Path
) -> None:
    """Compare bit for bit: the same number of processes reduces in the same order."""
    words = [*TINY_RUN, f"data.shards={digits}", "run_dir=run"]
    job = start_ranks(2, "train", *words, cwd=tmp_path, output=tmp_path / "log")
    wait_for(tmp_path / "run/checkpoints/step_00000010", job)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none may end by itself because the other was killed
        for pid in job.pids:
            os.kill(pid, number)
    job.wait()
    assert job.codes == [-signal.SIGKILL, -signal.SIGKILL]
    run_ranks(2, "train", *words, cwd=tmp_path)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (run_of_two / "metrics.jsonl").read_bytes()
    expected, found = weights(run_of_two), weights(tmp_path / "run")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_run_changes_its_number_of_processes_on_the_way(whole_run: Path, digits: Path, tmp_path: Path) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "run_dir=run"]
    killed_after(20, words, tmp_path)
    run_ranks(2, "train", *words, cwd=tmp_path)
    alone, mixed = json_lines(whole_run / "metrics.jsonl"), json_lines(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in mixed] == [line["step"] for line in alone]
    for one, two in zip(alone, mixed, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(digits: Path, tmp_path: Path) -> None:
    shown = run_ranks(2, "train", *TINY_RUN, f"data.shards={digits}", "batch_size=15", cwd=tmp_path, expect=2)
    assert "batch_size 15 is not a multiple of 2 processes; use 14 or 16" in shown


def test_more_processes_than_shards_are_refused(tmp_path: Path) -> None:
    ditscale("encode", "data.shards=one", "data.samples_per_shard=2000", cwd=tmp_path)
    shown = run_ranks(2, "train", *TINY_RUN, "data.shards=one", "run_dir=run", cwd=tmp_path, expect=2)
    assert "2 processes would read 1 shards; encode with a smaller data.samples_per_shard" in shown


def test_two_processes_generate_and_measure_the_same_as_one(digits: Path, tmp_path: Path) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "total_steps=10", "evaluate_every=10", "sampler.steps=5"]
    words += ["evaluation.num_images=101", "evaluation.batch_size=20", "evaluation.features.epochs=2"]
    ditscale("train", *words, "run_dir=one", cwd=tmp_path)
    run_ranks(2, "train", *words, "run_dir=two", cwd=tmp_path)
    (one,), (two,) = json_lines(tmp_path / "one/evaluations.jsonl"), json_lines(tmp_path / "two/evaluations.jsonl")
    assert two["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-2)
    assert two["feature_extractor_hash"] == one["feature_extractor_hash"]


def test_processes_of_different_settings_stop_at_the_start_and_name_them(digits: Path, tmp_path: Path) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "run_dir=run", "seed=${oc.env:RANK}"]
    shown = run_ranks(2, "train", *words, cwd=tmp_path, expect=2)
    assert "The processes of this job differ: " in shown
    assert "seed is 0 on process 0 and 1 on process 1" in shown
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_process_that_dies_stops_the_others_with_its_error(digits: Path, tmp_path: Path) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "run_dir=run", "total_steps=1000000"]
    log = tmp_path / "log"
    job = start_torchrun(2, "train", *words, cwd=tmp_path, output=log)
    wait_for(tmp_path / "run/checkpoints/step_00000010", job)
    workers = ranks_of(job)
    assert len(workers) == 2
    workers[1].kill()
    died = time.monotonic()
    assert job.wait() != 0
    assert time.monotonic() - died < 60
    assert not any(worker.is_running() for worker in workers)
    # The launcher names the killed one, or the other rank its lost connection, whichever is seen first.
    assert re.search(r"Signal 9 \(SIGKILL\) received|Connection (reset|closed) by peer", log.read_text())


def test_the_process_that_a_lost_host_leaves_exits_as_one_that_failed(digits: Path, tmp_path: Path) -> None:
    """So 1 must not end a JobSet of several pods (launch/k8s): the run is sound, and the same command continues it."""
    words = [*TINY_RUN, f"data.shards={digits}", "run_dir=run", "total_steps=1000000"]
    job = start_ranks(2, "train", *words, cwd=tmp_path, output=tmp_path / "log", launched=False)
    wait_for(tmp_path / "run/checkpoints/step_00000010", job)
    os.kill(job.pids[1], signal.SIGKILL)
    job.wait()
    assert job.codes == [1, -signal.SIGKILL]


@pytest.fixture
def adopted() -> Iterator[None]:
    """Make processes whose parent dies children of this one, which can then wait for their exit codes."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def ranks_without_their_torchrun(words: list[str], cwd: Path) -> list[psutil.Process]:
    """Return two training ranks whose torchrun was just killed with -9."""
    job = start_torchrun(2, "train", *words, cwd=cwd, output=cwd / "log")
    wait_for(cwd / "run/.lock", job)
    ranks = ranks_of(job)
    assert len(ranks) == 2
    wait_for(cwd / "run/checkpoints/step_00000010", job)
    for rank in ranks:  # else they would be through before they look for torchrun
        rank.suspend()
    os.kill(job.pids[0], signal.SIGKILL)
    job.wait()
    time.sleep(1.2)
    return ranks


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_ranks_whose_torchrun_was_killed_save_at_one_log_step_and_the_same_command_ends_with_the_same_bits(
    digits: Path, tmp_path: Path, adopted: None
) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "total_steps=100"]
    run_ranks(2, "train", *words, "run_dir=whole", cwd=tmp_path)
    ranks = ranks_without_their_torchrun([*words, "run_dir=run"], tmp_path)
    for rank in ranks:
        rank.resume()
    _, alive = psutil.wait_procs(ranks, timeout=120)
    assert alive == []
    assert [rank.wait() for rank in ranks] == [75, 75], (tmp_path / "log").read_text()
    run, whole = tmp_path / "run", tmp_path / "whole"
    stopped_at = step_of(list_checkpoints(run / "checkpoints")[-1])
    assert f"stopped and saved at step {stopped_at}; the same command continues" in (tmp_path / "log").read_text()
    assert stopped_at % 5 == 0
    assert json_lines(run / "metrics.jsonl")[-1]["step"] == stopped_at < 100
    with FileLock(run / ".lock", timeout=0):
        pass
    run_ranks(2, "train", *words, "run_dir=run", cwd=tmp_path)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("model", "ema", "optimizer"):
        last = f"checkpoints/step_00000100/{name}.safetensors"
        assert (run / last).read_bytes() == (whole / last).read_bytes(), name


def test_a_rank_that_lost_its_torchrun_and_the_other_rank_leaves_and_the_lock_is_free(
    digits: Path, tmp_path: Path
) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "total_steps=1000000", "run_dir=run"]
    main, other = ranks_without_their_torchrun(words, tmp_path)
    other.kill()
    main.resume()
    assert psutil.wait_procs([main, other], timeout=120)[1] == []
    with FileLock(tmp_path / "run/.lock", timeout=0):
        pass


def killed_after(step: int, words: list[str], cwd: Path) -> None:
    """Start training and kill -9 it once the checkpoint of ``step`` is there."""
    process = warm(*TRAINING).start(["train", *words], cwd, cwd / "log")
    wait_for(cwd / f"run/checkpoints/step_{step:08d}", process)
    time.sleep(random.Random(step).random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait_for(path: Path, process: subprocess.Popen[bytes] | WarmJob | WarmProcesses) -> None:
    """Wait until a running process has made the path."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_resume_after_kill_gives_the_same_weights(whole_run: Path, digits: Path, tmp_path: Path) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "run_dir=run"]
    for step in (10, 30):
        killed_after(step, words, tmp_path)
    ditscale("train", *words, cwd=tmp_path)
    for name, value in weights(whole_run).items():
        assert torch.equal(weights(tmp_path / "run")[name], value), name
    assert (tmp_path / "run/metrics.jsonl").read_text() == (whole_run / "metrics.jsonl").read_text()


def test_a_finished_run_started_again_changes_nothing(whole_run: Path, digits: Path) -> None:
    before = (whole_run / "metrics.jsonl").read_text()
    shown = ditscale("train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", cwd=whole_run.parent)
    assert "step 40" in shown
    assert (whole_run / "metrics.jsonl").read_text() == before


def test_other_shards_are_refused_when_a_run_continues(digits: Path, tmp_path: Path) -> None:
    words = [*TINY_RUN, "data.shards=shards", "run_dir=run"]
    ditscale("encode", "data.shards=shards", cwd=tmp_path)
    ditscale("train", *words, "total_steps=40", cwd=tmp_path)
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    ditscale("encode", "data.shards=shards", "seed=1", cwd=tmp_path)
    shown = ditscale("train", *words, cwd=tmp_path, expect=2)
    assert "was trained on shards with manifest" in shown
