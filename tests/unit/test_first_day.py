"""A new user is told where training starts and which results will be poor, and may give names for numbers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_RUN, InProcess, prepared_by
from pictures import make_autoencoder
from PIL import Image

from launch.command import progress as progress_module
from train.ema import MAIN, constant, initial_share_note, power, several, warmed_up

WORDS = [*TINY_RUN, "run_dir=run", "total_steps=4", "log_every=2", "checkpoint_every=2"]


@pytest.fixture(scope="module")
def there(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("there")
    prepared_by("train", *WORDS, f"data.shards={digits}", cwd=folder)
    return folder


def test_training_says_where_it_starts_and_continues_on_what_and_where_it_logs(
    digits: Path, in_process: InProcess
) -> None:
    shown = in_process("train", *WORDS, f"data.shards={digits}")
    assert "run: starts, to step 4, on cpu, fp32, no wandb\n" in shown
    more = [*WORDS, f"data.shards={digits}", "total_steps=6", "resume.allow=[total_steps]"]
    shown = in_process("train", *more, "train/logger=wandb")
    assert "run: continues from step 4, to step 6, on cpu, fp32, wandb offline\n" in shown
    assert "continues" not in in_process("train", *more)


def test_an_average_that_is_mostly_untrained_is_noted_at_the_start_and_in_samples(
    digits: Path, in_process: InProcess
) -> None:
    shown = in_process("train", *WORDS, f"data.shards={digits}", "train/ema=constant")
    assert "note: after 4 steps, 100% of the average 'ema' are still the untrained weights" in shown
    assert "train with train/ema=warmed_up" in shown
    sample = ["sample", "checkpoint=run", "num_images=2", "sampler.steps=2", "runtime=cpu", "out=x"]
    assert "100% of the average 'ema' are still the untrained weights" in in_process(*sample)
    assert "untrained" not in in_process(*sample, "weights=model")


def test_what_is_left_of_the_untrained_weights_is_what_the_updates_leave() -> None:
    import torch
    from torch import nn

    for averages in (constant, warmed_up):
        model = nn.Linear(1, 1)
        nn.init.ones_(model.weight)
        average = averages(model, 0.9).by_name[MAIN]
        nn.init.zeros_(model.weight)
        for step in range(7):
            assert average.initial_share(step) == pytest.approx(average.module.weight.item(), rel=1e-5)
            average.update()
    assert initial_share_note(power(nn.Linear(1, 1), [0.05]).by_name[MAIN], MAIN, 3) is None
    assert initial_share_note(several(nn.Linear(1, 1), [0.9999]).by_name[MAIN], MAIN, 600) is not None
    assert initial_share_note(several(nn.Linear(1, 1), [0.9999]).by_name[MAIN], MAIN, 400_000) is None
    assert torch.is_grad_enabled()


def test_a_width_that_cannot_hold_a_patch_is_noted(digits: Path, in_process: InProcess) -> None:
    words = ["train", *WORDS, f"data.shards={digits}", "model.width=8", "model.patch_size=4"]
    shown = in_process(*words)
    assert "note: model.width is 8, but a patch has 16 values (4x4 of 1 channels), which a token cannot hold" in shown
    assert "note: model.width" not in in_process(*words, "model.width=16", "run_dir=other")


def test_classes_are_sampled_by_name(there: Path, in_process: InProcess) -> None:
    sample = ["sample", f"checkpoint={there / 'run'}", "num_images=2", "sampler.steps=2", "runtime=cpu"]
    in_process(*sample, "labels=['7',3]", "out=x")
    assert np.load("x.npz")["arr_1"].tolist() == [7, 3]
    shown = in_process(*sample, "labels=[boot]", "out=y", expect=2)
    assert "labels has 'boot', but there is no such class. There are 10, from '0' to '9'." in shown


@pytest.mark.parametrize("word", ["logger=null", "logger=none", "train/logger=none"])
def test_no_logger_is_said_in_any_way(digits: Path, in_process: InProcess, word: str) -> None:
    words = [other for other in WORDS if not other.startswith("train/logger")]
    assert ", no wandb\n" in in_process("train", *words, f"data.shards={digits}", word)
    assert not Path("run/wandb").exists()
    shown = in_process("train", *words, f"data.shards={digits}", "logger=wandb", "run_dir=other", expect=2)
    assert "logger is 'wandb', but a logger is chosen by train/logger=wandb or train/logger=none." in shown


def test_a_report_of_runs_that_were_not_logged_logs_nothing(digits: Path, in_process: InProcess) -> None:
    measured = ["evaluate_every=4", "evaluation.num_images=20", "sampler.steps=2", "evaluation.features.epochs=1"]
    in_process("train", *WORDS, *measured, f"data.shards={digits}", "run_dir=runs/one")
    in_process("report", "sweep=runs", "samples=0", "runtime=cpu")
    assert not list(Path("runs").rglob("wandb"))


def test_a_log_file_gets_whole_lines_with_rate_time_left_and_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "QUIET_INTERVAL_SEC", 0.0)
    with progress_module.make_progress("run")("train", 10, 12, "step") as bar:
        bar.update()
        bar.note("loss 0.5")
        bar.update()
    first, second, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"run train: 11/12 step \(92%\), .* step/s, 00:00 left", first)
    assert re.fullmatch(r"run train: 12/12 step \(100%\), .* step/s, in 00:00, loss 0.5", second)
    assert last.startswith("run train: 12/12")
    assert "\r" not in first + second + last


def grey_folder(folder: Path, size: int = 8) -> None:
    dice = np.random.default_rng(0)
    for label in ("shirt", "boot"):
        for number in range(6):
            path = folder / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(dice.integers(256, size=(size, size), dtype=np.uint8)).save(path)


def test_grey_images_of_ones_own_train_as_grey_and_are_measured(tmp_path: Path, in_process: InProcess) -> None:
    grey_folder(tmp_path / "fashion")
    own = ["data=folder", "data.name=fashion", "data.source.root=fashion", "data.image_size=8", "data.shards=shards"]
    in_process("encode", *own, "model/autoencoder=identity_grey")
    tiny = [
        "model.width=16",
        "model.depth=1",
        "model.num_heads=2",
        "model.patch_size=4",
        "runtime=cpu",
        "precision=fp32",
    ]
    short = ["batch_size=4", "total_steps=2", "logger=null", "run_dir=run", "sample_every=2"]
    in_process("train", "data.shards=shards", *tiny, *short)
    few = ["evaluation.num_images=4", "sampler.steps=2", "evaluation.features.epochs=1", "runtime=cpu"]
    assert '"reference_images": 12' in in_process("evaluate", "checkpoint=run", *few)
    sample = ["sample", "checkpoint=run", "num_images=2", "sampler.steps=2", "runtime=cpu", "out=x"]
    in_process(*sample, "labels=[boot,shirt]")
    assert np.load("x.npz")["arr_1"].tolist() == [0, 1]
    assert np.load("x.npz")["arr_0"].shape == (2, 8, 8, 1)
    Image.new("RGB", (8, 8), (1, 2, 3)).save("fashion/boot/colour.png")
    shown = in_process("encode", *own, "model/autoencoder=identity_grey", "data.shards=other", expect=2)
    assert "boot/colour.png is in color, but the autoencoder identity takes 1 channel" in shown
    advised = "model/autoencoder=identity data.autoencoder.channels=3"
    assert f"make the images gray, or choose {advised}." in shown
    once_set = ["model/autoencoder=identity", "data.autoencoder.channels=1", "data.shards=other"]
    assert advised in in_process("encode", *own, *once_set, expect=2)  # there it is the channels that are to change


def test_an_autoencoders_own_factor_beats_a_default(tmp_path: Path, in_process: InProcess) -> None:
    make_autoencoder(tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    grey_folder(tmp_path / "images", size=16)
    words = [
        "encode",
        "data=folder",
        "data.name=x",
        "data.source.root=images",
        "data.image_size=16",
        "data.shards=shards",
    ]
    words += ["data.autoencoder.pretrained=vae", "data.autoencoder.precision=fp32"]
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    shown = in_process(*words, expect=2)
    assert "says scaling_factor 0.13025 in its config.json, but data.autoencoder.scale is 0.18215 by default" in shown
    assert "give data.autoencoder.scale=0.13025, or data.autoencoder.scale=0.18215 to keep it." in shown
    in_process(*words, "data.autoencoder.scale=0.13025")
    assert json.loads(Path("shards/manifest.json").read_text())["spec"]["scale"] == 0.13025
    Path("shards/shard-000000.tar").unlink()
    in_process("verify", "data.shards=shards", "repair=true")
