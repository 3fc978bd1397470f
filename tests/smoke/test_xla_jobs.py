"""Training, grids, evaluation and sampling work under XLA, as a user types them, on virtual devices of the CPU."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_RUN, ditscale, json_lines
from PIL import Image
from warm_python import FAST_COMPILE, WITH_XLA, run_warm_python

SMALL = [*TINY_RUN, "model.depth=1"]
XLA = ["runtime=xla", "runtime.cpu_devices=4", "runtime.mode=zero1"]
MEASURED = ["evaluation.num_images=102", "evaluation.batch_size=32", "evaluation.features.epochs=2", "sampler.steps=5"]

COUNTED = """
from launch import cli
cli.main()
import torch_xla.debug.metrics as metrics
print("programs compiled:", metrics.metric_data("CompileTime")[0])
"""


@pytest.fixture(scope="module")
def study(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the same run under XLA and under accelerate."""
    folder = tmp_path_factory.mktemp("xla")
    words = [*SMALL, f"data.shards={digits}", "total_steps=10", "sample_every=10", "evaluate_every=10", *MEASURED]
    ditscale("train", *words, *XLA, "run_dir=xla", cwd=folder, env=FAST_COMPILE)
    ditscale("train", *words, "runtime=accelerate", "runtime.device=cpu", "run_dir=accelerate", cwd=folder)
    return folder


def test_a_run_under_xla_has_the_files_and_numbers_of_one_under_accelerate(study: Path) -> None:
    runs = study / "xla", study / "accelerate"
    losses = [[line["loss"] for line in json_lines(run / "metrics.jsonl")] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    grids = [np.asarray(Image.open(run / "samples/step_00000010.png")).astype(int) for run in runs]
    assert np.abs(grids[0] - grids[1]).max() <= 1
    (one,), (two,) = (json_lines(run / "evaluations.jsonl") for run in runs)
    assert one["frechet_distance"] == pytest.approx(two["frechet_distance"], rel=1e-3)
    assert one["recognized_fraction"] == pytest.approx(two["recognized_fraction"], abs=0.02)


def test_a_run_under_xla_that_was_stopped_ends_with_the_same_bits(study: Path, digits: Path) -> None:
    words = [*SMALL, f"data.shards={digits}", *XLA, "run_dir=stopped"]
    ditscale("train", *words, "total_steps=5", cwd=study, env=FAST_COMPILE)
    ditscale("train", *words, "total_steps=10", "resume.allow=[total_steps]", cwd=study, env=FAST_COMPILE)
    for part in ("model", "ema", "optimizer"):
        file = f"checkpoints/step_00000010/{part}.safetensors"
        assert (study / "stopped" / file).read_bytes() == (study / "xla" / file).read_bytes(), part
    assert (study / "stopped/metrics.jsonl").read_bytes() == (study / "xla/metrics.jsonl").read_bytes()


def test_sampling_and_evaluating_under_xla_repeat_what_training_measured(study: Path) -> None:
    run = study / "xla"
    ditscale("evaluate", f"checkpoint={run}", *MEASURED, "runtime=xla", cwd=study, env=FAST_COMPILE)
    during, after = json_lines(run / "evaluations.jsonl")
    assert after["frechet_distance"] == pytest.approx(during["frechet_distance"], rel=1e-3)
    words = ["sample", f"checkpoint={run}", "num_images=7", "sampler.steps=5"]
    ditscale(*words, *XLA, "out=theirs", cwd=study, env=FAST_COMPILE)
    ditscale(*words, "runtime=auto", "out=ours", cwd=study)
    with np.load(study / "ours.npz") as ours, np.load(study / "theirs.npz") as theirs:
        assert ours["arr_0"].shape == theirs["arr_0"].shape == (7, 8, 8, 1)
        assert np.abs(ours["arr_0"].astype(int) - theirs["arr_0"]).max() <= 1


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_compiled(digits: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.shards={digits}", "run_dir=run", *XLA, "batch_size=18"]
    shown = ditscale("train", *words, cwd=tmp_path, expect=2)
    assert "batch_size 18 is not a multiple of 4 devices; use 16 or 20" in shown
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_job_that_logs_and_saves_on_its_way_compiles_one_program(digits: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.shards={digits}", "run_dir=run", "total_steps=20", *XLA]
    shown = run_warm_python(WITH_XLA, "-c", COUNTED, "train", *words, cwd=tmp_path, env=FAST_COMPILE)
    assert [line["step"] for line in json_lines(tmp_path / "run/metrics.jsonl")] == [5, 10, 15, 20]
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2
    assert "programs compiled: 1" in shown.splitlines()
