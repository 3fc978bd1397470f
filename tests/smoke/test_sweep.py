"""A killed sweep continues, and its runs stay separate."""

import threading
from pathlib import Path

import psutil
import pytest
from conftest import TINY_RUN, InProcess, ditscale, json_lines, torchrun
from test_processes import wait_for
from test_signals import same_run, start
from warm_jobs import WarmJob

SWEEP = [*TINY_RUN, "group=killed", "model.patch_size=4", "hydra.launcher.n_jobs=1", "seed=0,1,2", "model.width=16"]
TOTAL = 60  # steps of a run: a job is killed long before the end of one, after its first checkpoint
LAST = f"checkpoints/step_{TOTAL:08d}"
RUNS = [f"d16-n2-p4-adaln_zero-seed{seed}" for seed in range(3)]


def test_a_killed_sweep_skips_its_finished_runs_and_continues_the_others(tmp_path: Path, digits: Path) -> None:
    words = ["train", "-m", *SWEEP, f"data.shards={digits}", f"total_steps={TOTAL}"]
    first, second, third = (tmp_path / "runs/killed" / name for name in RUNS)
    sweep = start(words, tmp_path)
    wait_for(second / "checkpoints/step_00000010", sweep)  # the first run has ended, the second is under way
    for process in [psutil.Process(sweep.pid), *psutil.Process(sweep.pid).children()]:
        process.kill()
    sweep.wait()
    assert not third.exists()
    before = {path: path.read_text() for path in first.rglob("*.jsonl")}  # timing.jsonl is of the clock
    kept = json_lines(second / "metrics.jsonl")[0]
    assert len(json_lines(second / "metrics.jsonl")) < TOTAL / 5
    ditscale(*words, cwd=tmp_path)
    assert first / "timing.jsonl" in before
    assert {path: path.read_text() for path in before} == before
    for run in (first, second, third):
        assert [line["step"] for line in json_lines(run / "metrics.jsonl")] == list(range(5, TOTAL + 1, 5))
    assert json_lines(second / "metrics.jsonl")[0] == kept


def test_a_run_killed_in_its_last_evaluation_still_joins_the_groups_curve(tmp_path: Path, digits: Path) -> None:
    evaluation = [
        "total_steps=10",
        "evaluate_every=10",
        "sampler.steps=2",
        "evaluation.num_images=20",
        "evaluation.features.epochs=1",
    ]
    words = ["train", "-m", *TINY_RUN, "group=late", "model.patch_size=4,2", "hydra.launcher.n_jobs=1", *evaluation]
    ditscale(*words, f"data.shards={digits}", cwd=tmp_path)
    curve = tmp_path / "runs/late/report/figure_8.png"
    before = curve.read_bytes()
    # What such a kill leaves: the last checkpoint, the other run's numbers, and none of this one.
    (tmp_path / "runs/late/d16-n2-p2-adaln_zero-seed0/evaluations.jsonl").unlink()
    curve.unlink()
    ditscale(*words, f"data.shards={digits}", cwd=tmp_path)
    assert curve.read_bytes() == before


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the first run of the sweep, trained alone and uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    words = [word for word in SWEEP if not word.startswith(("hydra.", "seed="))]
    ditscale("train", *words, f"data.shards={digits}", f"total_steps={TOTAL}", "run_dir=run", cwd=folder)
    return folder / "run"


def process_of(run: Path, sweep: WarmJob) -> psutil.Process:
    """Return the process that trains a run, once it holds its lock."""
    lock = str(run / ".lock")
    wait_for(run / ".lock", sweep)
    while True:
        for process in psutil.Process(sweep.pid).children():
            if lock in [file.path for file in process.open_files()]:
                return process
        assert sweep.poll() is None


def steps_of(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    return [line["step"] for line in json_lines(metrics)] if metrics.exists() else []


@pytest.mark.parametrize("n_jobs", [2, 1])
def test_a_run_killed_with_9_is_that_runs_failure_alone_and_the_same_command_continues_it(
    tmp_path: Path, digits: Path, whole: Path, n_jobs: int
) -> None:
    words = ["train", "-m", *SWEEP, f"data.shards={digits}", f"total_steps={TOTAL}", f"hydra.launcher.n_jobs={n_jobs}"]
    first, second, third = (tmp_path / "runs/killed" / name for name in RUNS)
    sweep = start(words, tmp_path)
    neighbors = [process_of(run, sweep) for run in (first, second)[:n_jobs]]
    wait_for(first / "checkpoints/step_00000010", sweep)
    neighbors[0].kill()
    assert len({process.pid for process in (sweep, *neighbors)}) == 1 + n_jobs
    assert sweep.wait(120) == 1, (tmp_path / "log").read_text()
    shown = (tmp_path / "log").read_text()
    assert f"{first.name} failed: its process was killed by SIGKILL (often: the machine ran out of memory)" in shown
    assert ("train fewer in parallel (hydra.launcher.n_jobs)" in shown) == (n_jobs > 1)
    assert shown.splitlines()[-1].startswith(f"ditscale train: error: 1 of 3 runs failed: {first.name}; ")
    assert "Traceback" not in shown
    every_line = list(range(5, TOTAL + 1, 5))
    assert steps_of(first) != every_line
    assert steps_of(second) == steps_of(third) == every_line
    before = {path: path.read_bytes() for run in (second, third) for path in run.rglob("*.jsonl")}
    ditscale(*words, cwd=tmp_path)
    same_run(first, whole, last=LAST)
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_alone_is_asked_to_stop_leaves_the_others_training_and_the_sweep_unfinished(
    tmp_path: Path, digits: Path
) -> None:
    words = ["train", "-m", *SWEEP, f"data.shards={digits}", f"total_steps={TOTAL}", "hydra.launcher.n_jobs=2"]
    first, second, third = (tmp_path / "runs/killed" / name for name in RUNS)
    sweep = start(words, tmp_path)
    process = process_of(first, sweep)
    wait_for(first / "checkpoints/step_00000010", sweep)
    process.terminate()
    assert sweep.wait(120) == 75, (tmp_path / "log").read_text()
    assert "stopped and saved at step" in (tmp_path / "log").read_text()
    assert steps_of(first)[-1] < TOTAL
    assert steps_of(second)[-1] == steps_of(third)[-1] == TOTAL


def test_a_sweep_whose_process_cannot_be_forked_trains_in_fresh_ones(
    tmp_path: Path, digits: Path, whole: Path, in_process: InProcess
) -> None:
    """Start another thread, which a fork would not have and which may hold a lock."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        shown = in_process(
            "train",
            "-m",
            *SWEEP,
            f"data.shards={digits}",
            f"total_steps={TOTAL}",
            "seed=0",
            "optimizer.lr=1e10,4e-3",
            "name=${default_name}-${optimizer.lr}",
            "log_every=5",
            expect=1,
        )
    finally:
        done.set()
        thread.join()
    assert "1 of 2 runs failed: d16-n2-p4-adaln_zero-seed0-10000000000.0" in shown
    assert "Traceback" not in shown
    same_run(tmp_path / "runs/killed/d16-n2-p4-adaln_zero-seed0-0.004", whole, last=LAST)


def test_a_sweep_under_torchrun_trains_one_run_after_the_other_in_the_same_processes(
    tmp_path: Path, digits: Path
) -> None:
    torchrun(2, "-m", *SWEEP, f"data.shards={digits}", "seed=0,1", "total_steps=10", cwd=tmp_path)
    for name in RUNS[:2]:
        assert steps_of(tmp_path / "runs/killed" / name) == [5, 10]


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
