"""A training run killed at any moment ends in the same bits; a failed save loses nothing."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY_RUN, ditscale, json_lines, warm
from small_teacher import encode_with_teacher, small_teacher
from warm_jobs import TRAINING
from warm_python import TRAINING as PYTHON_TRAINING
from warm_python import run_with_little_room

KILLS = int(os.environ.get("DITSCALE_KILLS", "6"))  # `make soak` asks for more
STEPS = 60 * KILLS  # so that there is something left to kill
TIMEOUT_SEC = 300 + 20 * KILLS
LAST = f"checkpoints/step_{STEPS:08d}"


@pytest.fixture(scope="module")
def words(digits: Path) -> list[str]:
    """Return the settings of a run that often writes checkpoints, pictures and evaluations, with two averages."""
    often = [f"total_steps={STEPS}", "log_every=4", "checkpoint_every=6", "sample_every=30", "evaluate_every=30"]
    small = ["sampler.steps=2", "evaluation.num_images=40", "evaluation.batch_size=20", "evaluation.features.epochs=1"]
    averages = ["train/ema=several", "ema.decays=[0.995,0.9]"]
    return [*TINY_RUN, f"data.shards={digits}", "run_dir=run", *often, *small, *averages]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was not killed; its folder also has the trained feature classifier."""
    folder = tmp_path_factory.mktemp("whole")
    ditscale("train", *words, f"evaluation.cache={folder / 'cache'}", cwd=folder, timeout_sec=TIMEOUT_SEC)
    return folder / "run"


def state_of(run: Path) -> dict[str, bytes]:
    """Return every tensor of the last checkpoint, and the log, as bytes."""
    files = {path.name: path.read_bytes() for path in sorted((run / LAST).glob("*.safetensors"))}
    assert set(files) == {"model.safetensors", "ema.safetensors", "ema_0.9.safetensors", "optimizer.safetensors"}
    return {**files, "metrics.jsonl": (run / "metrics.jsonl").read_bytes()}


def writes_a_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob(".*.tmp"))


def evaluates(run: Path) -> bool:
    """Return whether the picture of a step exists but its evaluation does not."""
    return len(list((run / "samples").glob("step_*.png"))) > len(lines_of(run / "evaluations.jsonl"))


def lines_of(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines() if file.exists() else []


MOMENTS: list[Callable[[Path], bool]] = [lambda run: True, writes_a_checkpoint, evaluates]


def killed(words: list[str], cwd: Path, in_moment: Callable[[Path], bool], after_sec: float) -> bool:
    """Start training; kill -9 it at such a moment after it has written a line. Returns whether that succeeded."""
    run, before = cwd / "run", time.time()
    process = warm(*TRAINING).start(["train", *words], cwd, cwd / "log")
    timing = run / "timing.jsonl"
    while process.poll() is None and not (timing.exists() and timing.stat().st_mtime > before and lines_of(timing)):
        time.sleep(0.002)
    time.sleep(after_sec)
    hit = False
    while process.poll() is None and not hit:
        time.sleep(0.001)
        hit = in_moment(run)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return hit


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(whole: Path, words: list[str], tmp_path: Path) -> None:
    """Kill within a step, while a checkpoint is written, and within an evaluation."""
    chance, run = random.Random(KILLS), tmp_path / "run"
    words = [*words, f"evaluation.cache={whole.parent / 'cache'}"]
    hits = [killed(words, tmp_path, MOMENTS[number % 3], chance.random() * 0.1) for number in range(KILLS)]
    shown = ditscale("train", *words, cwd=tmp_path, timeout_sec=TIMEOUT_SEC)
    assert f"step {STEPS}" in shown
    assert sum(hits) >= KILLS / 2, (tmp_path / "log").read_text()
    assert state_of(run) == state_of(whole)
    assert evaluations_of(run) == evaluations_of(whole)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_flow_with_logit_normal_times_and_repa_is_killed_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    encode_with_teacher(tmp_path / "shards", small_teacher(tmp_path / "dinov2"))
    flow = ["diffusion=flow", "diffusion/times=logit_normal", "diffusion/sampler=euler", "sampler.steps=2"]
    flow += ["model.patch_size=4", "train/alignment=repa", "alignment.block=1", "alignment.hidden=16", "batch_size=8"]
    often = ["total_steps=60", "log_every=4", "checkpoint_every=6", f"data.shards={tmp_path}/shards", "run_dir=run"]
    end, ends = "checkpoints/step_00000060", []
    for kills in (0, 1):
        folder = tmp_path / str(kills)
        folder.mkdir()
        for _ in range(kills):
            killed([*TINY_RUN, *often, *flow], folder, writes_a_checkpoint, after_sec=0.05)
            assert not (folder / "run" / end).exists()
        ditscale("train", *TINY_RUN, *often, *flow, cwd=folder, timeout_sec=TIMEOUT_SEC)
        last = sorted((folder / "run" / end).glob("*.safetensors"))
        ends.append([path.read_bytes() for path in [*last, folder / "run/metrics.jsonl"]])
    assert len(ends[0]) == 4
    assert ends[0] == ends[1]


def evaluations_of(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["frechet_distance"]) for line in json_lines(run / "evaluations.jsonl")]


def test_a_disk_that_fills_up_while_saving_loses_nothing(digits: Path, tmp_path: Path) -> None:
    """Limit the size of files, which looks like a full disk to a writer: half of the optimizer's state fits."""
    words = [*TINY_RUN, f"data.shards={digits}", "run_dir=run"]
    ditscale("train", *words, cwd=tmp_path)
    (tmp_path / "run").rename(tmp_path / "whole")
    ditscale("train", *words, "total_steps=10", cwd=tmp_path)
    half = (tmp_path / "whole/checkpoints/step_00000040/optimizer.safetensors").stat().st_size // 2
    full = ["train", *words, "resume.allow=[total_steps]"]
    shown = run_with_little_room(PYTHON_TRAINING, half, *full, cwd=tmp_path, expect=2)
    assert "cannot be written: " in shown
    assert "free some space, then give the same command again" in shown
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000010"]
    ditscale(*full, cwd=tmp_path)
    for name in ("model", "ema", "optimizer"):
        file = f"checkpoints/step_00000040/{name}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert (tmp_path / "run/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


def test_a_folder_that_may_not_be_written_is_one_sentence(digits: Path, tmp_path: Path) -> None:
    """Use a folder in /sys, where not even root can make folders."""
    shown = ditscale("train", *TINY_RUN, f"data.shards={digits}", "run_dir=/sys/ditscale", cwd=tmp_path, expect=2)
    assert "A file /sys/ditscale cannot be read or written: " in shown
    assert "Traceback" not in shown
