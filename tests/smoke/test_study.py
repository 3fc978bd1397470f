"""All jobs work end to end, as a user types them: a small sweep on the digits ends in a curve."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ditscale, json_lines
from PIL import Image
from wandb_file import history_of, metric_axes, offline_history, run_group

SWEEP = [
    "experiment=demo",
    "group=small",
    "model.width=16",
    "model.patch_size=4,2",
    "model.depth=2",
    "total_steps=30",
    "log_every=10",
    "checkpoint_every=10",
    "sample_every=30",
    "evaluate_every=30",
    "sampler.steps=10",
    "evaluation.num_images=200",
    "evaluation.features.epochs=3",
    "hydra.launcher.n_jobs=2",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which encode, a sweep of one model, the same of two, and the report have run."""
    folder = tmp_path_factory.mktemp("study")
    ditscale("encode", cwd=folder)
    ditscale("train", "-m", *SWEEP, "model.patch_size=4", cwd=folder, env={"WANDB_MODE": "offline"})
    ditscale("train", "-m", *SWEEP, cwd=folder, env={"WANDB_MODE": "offline"})
    ditscale("report", "sweep=runs/small", "sampler.steps=10", cwd=folder, env={"WANDB_MODE": "offline"})
    return folder


def runs(study: Path) -> list[Path]:
    return sorted(path.parent for path in study.glob("runs/small/*/config.yaml"))


def test_each_run_folder_is_complete(study: Path) -> None:
    assert [path.name for path in runs(study)] == [f"d16-n2-p{p}-adaln_zero-seed0" for p in (2, 4)]
    for run in runs(study):
        assert [line["step"] for line in json_lines(run / "metrics.jsonl")] == [10, 20, 30]
        assert {"step_time_sec", "images_per_sec"} <= json_lines(run / "timing.jsonl")[0].keys()
        assert (run / "checkpoints/step_00000030/state.json").exists()
        assert Image.open(run / "samples/step_00000030.png").size == (662, 530)
        (evaluation,) = json_lines(run / "evaluations.jsonl")
        assert evaluation["step"] == 30
        assert evaluation["frechet_distance"] > 0
        assert 0 <= evaluation["recognized_fraction"] <= 1
        assert evaluation["classifier_accuracy"] > 0.5


def test_the_report_holds_what_the_runs_measured(study: Path) -> None:
    with (study / "runs/small/report/fid_vs_gflops.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    for run in runs(study):
        (evaluation,) = json_lines(run / "evaluations.jsonl")
        assert float(rows[run.name]["frechet_distance"]) == evaluation["frechet_distance"]
        assert float(rows[run.name]["gmacs"]) == evaluation["gmacs"]
    assert Image.open(study / "runs/small/report/figure_8.png").size[0] > 600
    assert Image.open(study / "runs/small/report/figure_7.png").size[0] > 200
    page = (study / "runs/small/report/report.html").read_text()
    assert all(run.name in page for run in runs(study))


def test_wandb_holds_the_losses_and_the_distance(study: Path) -> None:
    history = offline_history(runs(study)[0])
    losses = {json.loads(row["step"]): json.loads(row["loss"]) for row in history if "loss" in row}
    assert losses == {line["step"]: line["loss"] for line in json_lines(runs(study)[0] / "metrics.jsonl")}
    assert any("frechet_distance" in row for row in history)


def test_the_groups_curve_and_table_grow_when_a_run_ends(study: Path) -> None:
    folder = study / "runs/small/report"
    opened = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(opened) == 3  # one run ended, then the other, which alone was new, then the report
    assert len({path.stem for path in opened}) == 1  # of one wandb run
    sizes = []
    for path in opened:
        rows = history_of(path)
        (name,) = (json.loads(row["fid_vs_gflops.path"]) for row in rows if "fid_vs_gflops.path" in row)
        content = json.loads((path.parent / "files" / name).read_text())
        assert {"gmacs", "training_gmacs", "images_seen", "frechet_distance"} <= set(content["columns"])
        assert any(key.startswith("fid_vs_gflops_chart") for row in rows for key in row)
        sizes.append(len(content["data"]))
    assert sorted(sizes) == [1, 2, 2]


def test_wandb_draws_the_distance_over_images_seen_and_knows_the_group(study: Path) -> None:
    (path,) = runs(study)[0].glob("wandb/offline-run-*/run-*.wandb")
    axes = metric_axes(path)
    assert axes["frechet_distance"] == "images_seen"
    assert axes["*"] == "step"
    assert {"images_seen", "gmacs", "training_gmacs"} <= axes.keys()
    assert run_group(path) == "small"


def test_sampling_gives_a_grid_and_an_adm_file(study: Path) -> None:
    run = runs(study)[0]
    words = ["sample", f"checkpoint={run}", "num_images=23", "sampler.steps=10"]
    ditscale(*words, "out=a", "batch_size=23", cwd=study)
    ditscale(*words, "out=b", "batch_size=4", cwd=study)
    with np.load(study / "a.npz", allow_pickle=False) as first, np.load(study / "b.npz", allow_pickle=False) as second:
        assert first["arr_0"].shape == (23, 8, 8, 1)
        assert first["arr_0"].dtype == np.uint8
        assert first["arr_1"].tolist() == [i % 10 for i in range(23)]
        difference = np.abs(first["arr_0"].astype(int) - second["arr_0"].astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
    assert Image.open(study / "a.png").size == (662, 200)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_pp", "heun"])
def test_every_sampler_is_chosen_on_the_command_line(study: Path, sampler: str) -> None:
    words = ["sample", f"checkpoint={runs(study)[0]}", "num_images=3", "sampler.steps=6"]
    ditscale(*words, f"diffusion/sampler={sampler}", f"out={sampler}", cwd=study)
    with np.load(study / f"{sampler}.npz") as images:
        assert images["arr_0"].shape == (3, 8, 8, 1)
        assert images["arr_0"].std() > 10


def test_guidance_and_labels_are_chosen_on_the_command_line(study: Path) -> None:
    run = runs(study)[0]
    words = ["sample", f"checkpoint={run}", "num_images=6", "labels=[3,10]", "sampler.steps=5"]
    ditscale(*words, "out=plain", cwd=study)
    ditscale(*words, "out=guided", "diffusion/guidance=classifier_free", "guidance.scale=4", cwd=study)
    with np.load(study / "plain.npz") as plain, np.load(study / "guided.npz") as guided:
        assert plain["arr_1"].tolist() == [3, 10, 3, 10, 3, 10]
        assert not np.array_equal(plain["arr_0"][0], guided["arr_0"][0])
        difference = plain["arr_0"][1].astype(int) - guided["arr_0"][1]  # the null class guides itself nowhere
        assert np.abs(difference).max() <= 1


def test_evaluating_checkpoints_repeats_the_numbers_of_training_and_sweeps_the_sampling_steps(study: Path) -> None:
    words = ["evaluation.num_images=200", "evaluation.features.epochs=3", "sampler.steps=10,4", "runtime.device=cpu"]
    ditscale("evaluate", "-m", f"checkpoint={','.join(map(str, runs(study)))}", *words, cwd=study)
    for run in runs(study):
        during, after, fewer = json_lines(run / "evaluations.jsonl")
        assert after.keys() == during.keys()
        assert after["frechet_distance"] == pytest.approx(during["frechet_distance"], rel=1e-6)
        assert fewer["sampler"] == {**after["sampler"], "steps": 4}
    assert not (study / "multirun.yaml").exists()
    ditscale("report", "sweep=runs/small", "train/logger=none", "samples=0", "out=swept", cwd=study)
    assert Image.open(study / "swept/figure_10.png").size[0] > 600


def test_exported_weights_come_back_as_starting_weights(study: Path) -> None:
    run = runs(study)[0]
    ditscale("export", f"checkpoint={run}", "to=reference", "out=a.pt", cwd=study)
    ditscale("export", f"checkpoint={run}", "to=diffusers", "out=folder", cwd=study)
    words = [word for word in SWEEP if not word.startswith(("model.patch_size", "hydra.", "sample_", "evaluate_"))]
    words += ["train/logger=none", "group=tuned", "model.patch_size=2", "sample_every=null", "evaluate_every=null"]
    words += ["total_steps=10"]
    losses = {}
    for start in ("a.pt", "folder", str(run), "null"):
        name = f"from-{Path(start).stem}"
        ditscale("train", *words, f"name={name}", f"init_from={start}", cwd=study)
        losses[start] = json_lines(study / "runs/tuned" / name / "metrics.jsonl")[0]["loss"]
    assert losses["a.pt"] == losses["folder"] == losses[str(run)]  # the same EMA weights, whatever the way
    assert losses["a.pt"] < 0.95 * losses["null"]
    shown = ditscale("train", *words, "name=other", "init_from=a.pt", "model.width=32", cwd=study, expect=2)
    assert "init_from a.pt has width 16, but model.width is 32" in shown


def test_foreign_weights_give_the_images_that_ours_give(study: Path) -> None:
    run = runs(study)[0]
    ditscale("export", f"checkpoint={run}", "to=reference", "out=foreign.pt", cwd=study)
    ditscale("export", f"checkpoint={run}", "to=diffusers", "out=foreign-folder", cwd=study)
    words = ["num_images=4", "sampler.steps=5"]
    ditscale("sample", f"checkpoint={run}", *words, "out=native", cwd=study)
    settings = ["data.autoencoder.channels=1", "foreign.num_heads=4", "foreign.frequency_shift=0"]
    for where in ("foreign.pt", "foreign-folder"):
        ditscale("sample", f"checkpoint={where}", *words, *settings, "out=theirs", cwd=study)
        with np.load(study / "native.npz") as ours, np.load(study / "theirs.npz") as theirs:
            assert np.array_equal(ours["arr_0"], theirs["arr_0"])
    shown = ditscale("sample", "checkpoint=foreign.pt", *words, "foreign.num_heads=4", cwd=study, expect=2)
    assert "are for latents of 1 channels, but the autoencoder identity has 3" in shown
    (study / "bad.pt").write_bytes(b"not a checkpoint")
    shown = ditscale("sample", "checkpoint=bad.pt", *words, cwd=study, expect=2)
    assert "bad.pt is neither a PyTorch nor a safetensors file" in shown


def test_the_plan_of_the_papers_sweep_is_its_table(tmp_path: Path) -> None:
    words = ["plan", "-m", "model/size=s,xl", "model.patch_size=8,2"]
    shown = ditscale(*words, "format=json", cwd=tmp_path)
    rows = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    assert [row["gmacs"] for row in rows] == pytest.approx([0.36, 6.06, 7.39, 118.64], rel=0.006)
    assert [row["parameters_millions"] for row in rows] == pytest.approx([33.1, 33.0, 675.7, 675.1], rel=0.006)
    xl = rows[-1]
    assert xl["training_exaflops"] == pytest.approx(2 * 3 * 118.62e9 * 400_000 * 256 / 1e18, rel=1e-3)
    assert xl["training_hours"] == pytest.approx(xl["training_exaflops"] * 1e18 / (8 * 989e12 * 0.4) / 3600, rel=1e-6)
    assert xl["state_gb"] == pytest.approx(20 * 0.6751, rel=1e-3)
    assert rows[2]["step_gb"] == pytest.approx(24 * 0.6757, rel=1e-3)  # at a log step
    assert xl["step_gb"] > xl["activations_gb"] + 16 * 0.6751  # before the backward pass
    shown = ditscale("plan", "-m", "model/size=s", "model.patch_size=8,2", cwd=tmp_path)
    text = [line for line in shown.splitlines() if "adaln_zero" in line or "Gflops" in line]
    assert len(text) == 3
    assert "6.056" in text[-1]


def test_a_worse_checkpoint_guides_a_better_one(study: Path) -> None:
    better, worse = runs(study)
    words = ["sample", f"checkpoint={better}", "num_images=4", "sampler.steps=5"]
    ditscale(*words, "out=alone", cwd=study)
    guidance = ["diffusion/guidance=autoguidance", f"guidance.guide={worse}"]
    for scale in (1, 3):
        ditscale(*words, *guidance, f"out=scale{scale}", f"guidance.scale={scale}", cwd=study)
    with (
        np.load(study / "alone.npz") as alone,
        np.load(study / "scale1.npz") as one,
        np.load(study / "scale3.npz") as three,
    ):
        assert np.abs(alone["arr_0"].astype(int) - one["arr_0"]).max() <= 1
        assert np.abs(alone["arr_0"].astype(int) - three["arr_0"]).max() > 10


def test_bits_per_dimension_do_not_depend_on_the_batch_and_leave_the_curve_alone(study: Path) -> None:
    run = runs(study)[1]
    before = json_lines(run / "evaluations.jsonl")
    words = ["evaluate", f"checkpoint={run}", "metrics=[nll]", "evaluation.num_images=3"]
    for batch_size in (3, 2):
        ditscale(*words, f"evaluation.batch_size={batch_size}", cwd=study)
    one, two = json_lines(run / "evaluations.jsonl")[len(before) :]
    assert one["bits_per_dimension"] == pytest.approx(two["bits_per_dimension"], rel=1e-4)
    assert (one["likelihood_images"], one["likelihood_steps"]) == (3, 1000)
    assert one["bits_per_dimension"] > 0
    assert "frechet_distance" not in one
    ditscale("report", "sweep=runs/small", "train/logger=none", "sampler.steps=10", cwd=study)
    shown = ditscale(*words[:2], "metrics=[nlll]", cwd=study, expect=2)
    assert "There is no metric 'nlll'; did you mean 'nll'?" in shown


def test_a_sweep_started_again_trains_nothing_anew(study: Path) -> None:
    """One run's last evaluation, of the test before, has no distance: the sweep's summary shows the last that has."""
    before = {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in runs(study)}
    history = {run: (run / "metrics.jsonl").read_text() for run in runs(study)}
    ditscale("train", "-m", *SWEEP, cwd=study, env={"WANDB_MODE": "offline"})
    assert {run: (run / "metrics.jsonl").read_text() for run in runs(study)} == history
    assert before.keys() == history.keys()
    for run in runs(study):
        assert len(list(run.glob("wandb/offline-run-*"))) == 1


def test_without_wandb_no_file_of_it_appears(study: Path) -> None:
    words = [word for word in SWEEP if not word.startswith(("model.patch_size", "group", "hydra."))]
    shards, cache = study / "shards/digits", study / "cache"
    settings = [f"data.shards={shards}", f"evaluation.features.cache={cache}", "train/logger=none"]
    ditscale("train", *words, "group=bare", *settings, "model.patch_size=4", "name=run", cwd=study)
    assert json_lines(study / "runs/bare/run/evaluations.jsonl")
    assert not list((study / "runs/bare").rglob("*wandb*"))
