"""A sweep that is killed, and what keeps its runs apart."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import TINY_RUN, command, ditscale, json_lines

SWEEP = [*TINY_RUN, "group=killed", "model.patch_size=4", "hydra.launcher.n_jobs=1", "seed=0,1,2", "model.width=16"]
RUNS = [f"d16-n2-p4-adaln_zero-seed{seed}" for seed in range(3)]


def test_a_killed_sweep_skips_its_finished_runs_and_continues_the_others(tmp_path: Path, digits: Path) -> None:
    words = ["train", "-m", *SWEEP, f"data.shards={digits}", "total_steps=200"]
    first, second, third = (tmp_path / "runs/killed" / name for name in RUNS)
    sweep = subprocess.Popen(
        command(*words), cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 200
        while not list(second.glob("checkpoints/step_*")):  # the first run has ended, the second is under way
            assert sweep.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()
    assert not third.exists()
    before = {path: path.read_text() for path in first.rglob("*.jsonl")}  # timing.jsonl is of the clock
    kept = json_lines(second / "metrics.jsonl")[0]
    assert len(json_lines(second / "metrics.jsonl")) < 40
    ditscale(*words, cwd=tmp_path)
    assert first / "timing.jsonl" in before
    assert {path: path.read_text() for path in before} == before
    for run in (first, second, third):
        assert [line["step"] for line in json_lines(run / "metrics.jsonl")] == list(range(5, 201, 5))
    assert json_lines(second / "metrics.jsonl")[0] == kept


def test_a_run_killed_in_its_last_evaluation_still_joins_the_groups_curve(tmp_path: Path, digits: Path) -> None:
    evaluation = ["evaluate_every=40", "sampler.steps=2", "evaluation.num_images=20", "evaluation.features.epochs=1"]
    words = ["train", "-m", *TINY_RUN, "group=late", "model.patch_size=4,2", "hydra.launcher.n_jobs=1", *evaluation]
    ditscale(*words, f"data.shards={digits}", cwd=tmp_path)
    curve = tmp_path / "runs/late/report/figure_8.png"
    before = curve.read_bytes()
    # What such a kill leaves: the last checkpoint, the other run's numbers, and none of this one.
    (tmp_path / "runs/late/d16-n2-p2-adaln_zero-seed0/evaluations.jsonl").unlink()
    curve.unlink()
    ditscale(*words, f"data.shards={digits}", cwd=tmp_path)
    assert curve.read_bytes() == before


@pytest.mark.parametrize(
    "sweep",
    [
        "optimizer.lr=1e-3,2e-3",
        "seed=1,1",
        "experiment=demo ema.decay=0.9,0.99",
        "name=${default_name}-lr${optimizer.lr} ema.decay=0.9,0.99",
    ],
)
def test_a_sweep_whose_runs_would_share_a_folder_starts_none(tmp_path: Path, sweep: str) -> None:
    shown = ditscale("train", "-m", *TINY_RUN, *sweep.split(), cwd=tmp_path, expect=2)
    assert "runs of this sweep would share the folder runs/demo/d16-n2-p" in shown
    assert not (tmp_path / "runs").exists()


def test_a_sweep_names_every_run_that_failed_and_trains_the_others(tmp_path: Path, digits: Path) -> None:
    name, rates = "name=lr${optimizer.lr}", "optimizer.lr=1e10,1e-3,2e10"
    words = ["train", "-m", *TINY_RUN, f"data.shards={digits}", "model.patch_size=4", "total_steps=5", name, rates]
    shown = ditscale(*words, "hydra.launcher.n_jobs=2", cwd=tmp_path, expect=1)  # 1: diverged
    for rate in ("10000000000.0", "20000000000.0"):
        assert f"lr{rate} failed: loss is inf in step 2" in shown
    assert "runs/demo/lr0.001: step 5" in shown
    assert shown.count("ditscale train: error: ") == 1
    assert "UserWarning" not in shown
