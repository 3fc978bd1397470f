"""Jobs sample from, start from, and export weights of other programs."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess
from foreign_files import HEADS, change_json, random_model, released_weights, saved, zeros_like
from safetensors.torch import load_file
from torch import Tensor

from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from launch.builders.foreign import is_foreign
from launch.builders.training import load_starting_weights
from model.diffusers_weights import to_diffusers
from model.dit import DiT, DiTConfig
from model.released import from_reference, to_reference

GAUSSIAN = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
GOLDEN = released_weights()
TABLE = "y_embedder.embedding_table.weight"
SAMPLE = ["sample", "runtime=cpu", "num_images=3", "sampler.steps=2", "data.autoencoder.channels=4"]


def images(name: str) -> np.ndarray:
    found: np.ndarray = np.load(f"{name}.npz", allow_pickle=False)["arr_0"].astype(int)
    return found


def digits_model(**changes: int) -> DiT:
    """Return a DiT of the shape that `TINY_RUN` trains, with weights that are not zero."""
    shape = {"latent_size": 8, "channels": 1, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2}
    model = DiT(DiTConfig(**{**shape, "num_classes": 10, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


def drifted(weights: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    return {**weights, "pos_embed": weights["pos_embed"] + by * torch.sin(torch.arange(weights["pos_embed"].shape[2]))}


def test_sampling_says_which_table_it_took_and_takes_the_one_that_weights_names(
    tmp_path: Path, in_process: InProcess
) -> None:
    arguments = argparse.Namespace(num_classes=10)
    saved(tmp_path / "trained.pt", {"model": zeros_like(GOLDEN), "ema": GOLDEN, "opt": {}, "args": arguments})
    saved(tmp_path / "raw.pt", {"model": GOLDEN, "opt": {}, "args": arguments})
    shown = in_process(*SAMPLE, HEADS, "checkpoint=trained.pt", "out=a")
    assert "note: trained.pt: its table 'ema' is used (of 'model', 'ema')." in shown
    shown = in_process(*SAMPLE, HEADS, "checkpoint=raw.pt", "out=b")
    assert "note: raw.pt: its table 'model' is used; there is no 'ema', so these may not be averaged" in shown
    assert np.array_equal(images("a"), images("b"))
    in_process(*SAMPLE, HEADS, "checkpoint=trained.pt", "weights=model", "out=c")
    assert not np.array_equal(images("a"), images("c"))


def test_sampling_computes_with_the_position_embedding_of_the_file(tmp_path: Path, in_process: InProcess) -> None:
    """Drift the embedding as the released trainer's averaging does; moved to the patches' biases it gives the same."""
    weights = drifted(GOLDEN, 0.3)
    saved(tmp_path / "drifted.pt", weights)
    moved = {
        **GOLDEN,
        "x_embedder.proj.bias": GOLDEN["x_embedder.proj.bias"] + (weights["pos_embed"] - GOLDEN["pos_embed"])[0, 0],
    }
    saved(tmp_path / "moved.pt", moved)
    saved(tmp_path / "fixed.pt", GOLDEN)
    for name in ("drifted", "moved", "fixed"):
        shown = in_process(*SAMPLE, HEADS, f"checkpoint={name}.pt", f"out={name}")
        assert ("its position embedding differs from the fixed one by up to 0.3; its own is used" in shown) == (
            name == "drifted"
        )
    assert np.abs(images("drifted") - images("moved")).max() <= 1
    assert np.abs(images("drifted") - images("fixed")).max() > 1


def test_weights_without_a_learned_variance_name_the_setting_that_sampling_has(
    tmp_path: Path, in_process: InProcess
) -> None:
    fixed = digits_model(channels=4, outputs_per_channel=1)
    saved(tmp_path / "fixed.pt", to_reference(fixed))
    words = [*SAMPLE, "foreign.num_heads=2", "checkpoint=fixed.pt", "out=x"]
    shown = in_process(*words, expect=2)
    assert "The objective needs 8 output channels, but fixed.pt has 4" in shown
    assert "set diffusion/variance=fixed_large or fixed_small." in shown
    for variance in ("fixed_large", "fixed_small"):
        in_process(*words, f"diffusion/variance={variance}")
    saved(tmp_path / "learned.pt", GOLDEN)
    shown = in_process(*SAMPLE, HEADS, "checkpoint=learned.pt", "diffusion/variance=fixed_small", expect=2)
    assert "but learned.pt has 8; set diffusion/variance=learned_range." in shown


def test_a_network_without_a_null_class_is_sampled_but_not_guided(tmp_path: Path, in_process: InProcess) -> None:
    saved(tmp_path / "a.pt", GOLDEN)
    words = [*SAMPLE, HEADS, "foreign.num_classes=11", "checkpoint=a.pt", "out=x"]
    in_process(*words, "labels=[10]")
    assert (
        "a.pt has no null class (its label table has 11 rows for as many classes), which guidance needs"
        in in_process(*words, "diffusion/guidance=classifier_free", expect=2)
    )
    shown = in_process(*words, "labels=[3,11]", expect=2)
    assert "labels has 11, the null class, but a.pt was trained without label dropout and has none" in shown
    assert "labels has 12" in in_process(*words, "labels=[12]", expect=2)
    shown = in_process(*SAMPLE, HEADS, "checkpoint=a.pt", "out=x", "diffusion/guidance=classifier_free")
    assert "note: a.pt: its label table has 11 rows: 10 classes and the null class, or 11 classes of" in shown


def test_a_process_that_the_file_contradicts_is_said(tmp_path: Path, in_process: InProcess) -> None:
    saved(tmp_path / "a.pt", {"ema": GOLDEN, "args": argparse.Namespace(diffusion_steps=100, num_classes=10)})
    words = [*SAMPLE, HEADS, "checkpoint=a.pt", "out=x"]
    shown = in_process(*words)
    settings = ["num_steps=100", "beta_start=0.001", "beta_end=0.2"]
    asked = [f"diffusion.schedule.{setting}" for setting in settings]
    assert f"trained with 100 diffusion steps, but diffusion.schedule has 1000; set {' '.join(asked)}." in shown
    assert "diffusion steps" not in in_process(*words, *asked)
    to_diffusers(random_model(), tmp_path / "folder")
    words = [*SAMPLE, "checkpoint=folder", "out=x"]
    assert "another process" not in in_process(*words)
    scheduler = tmp_path / "folder/scheduler/scheduler_config.json"
    change_json(scheduler, beta_schedule="squaredcos_cap_v2")
    shown = in_process(*words)
    assert "(num_train_timesteps 1000, beta_schedule squaredcos_cap_v2, beta_start 0.0001" in shown
    assert "another process" not in in_process(*words, "diffusion/schedule=cosine")
    change_json(scheduler, beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=1.2e-2)
    assert "another process" in in_process(*words)
    assert "another process" not in in_process(*words, "diffusion/schedule=scaled_linear")
    change_json(scheduler, prediction_type="v_prediction")
    assert "says that the network predicts 'v_prediction'" in in_process(*words, expect=2)
    for content, fault in (
        ('{"beta_start": "x"}', "beta_start is 'x'"),
        ('{"num_train_timesteps": 1000000000}', "num_train_timesteps is 1000000000"),
        ("[]", "it holds a list"),
    ):
        scheduler.write_text(content)
        assert f"scheduler_config.json is damaged: {fault}" in in_process(*words, expect=2)
    scheduler.write_text('{"beta_end": 7.0}')
    assert "another process (beta_end 7.0)" in in_process(*words)


def train(in_process: InProcess, digits: Path, *words: str, expect: int = 0) -> str:
    short = ["total_steps=2", "checkpoint_every=1", "log_every=1"]
    return in_process("train", *TINY_RUN, *short, f"data.shards={digits}", *words, expect=expect)


def test_a_run_starts_from_a_drifted_position_embedding_with_the_fixed_one_and_says_so(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    weights = to_reference(digits_model())
    saved(tmp_path / "fixed.pt", {"ema": weights})
    saved(tmp_path / "drifted.pt", {"ema": drifted(weights, 1.6e-4)})
    shown = train(in_process, digits, "init_from=drifted.pt", "run_dir=drifted")
    assert "drifted.pt: this run replaces its position embedding by the fixed one (difference 0.00016)." in shown
    assert "its own is used" not in shown
    assert "takes the place" not in train(in_process, digits, "init_from=fixed.pt", "run_dir=fixed")
    one, other = (
        load_file(tmp_path / name / "checkpoints/step_00000002/model.safetensors") for name in ("drifted", "fixed")
    )
    assert one.keys() == digits_model().state_dict().keys()  # as of any run: nothing new in the format
    assert all(torch.equal(one[name], other[name]) for name in one)
    train(in_process, digits, "run_dir=drifted", "total_steps=4", "resume.allow=[total_steps]")
    assert (tmp_path / "drifted/checkpoints/step_00000004").is_dir()


def test_a_run_does_not_start_from_a_trained_position_embedding(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    saved(tmp_path / "trained.pt", drifted(to_reference(digits_model()), 0.3))
    shown = train(in_process, digits, "init_from=trained.pt", "run_dir=x", expect=2)
    words = "which differs by up to 0.3 from the fixed one of a run"
    assert f"init_from trained.pt has a trained position embedding, {words}" in shown
    assert not (tmp_path / "x").exists()


def test_a_run_starts_from_weights_of_another_resolution(digits: Path, tmp_path: Path, in_process: InProcess) -> None:
    large = digits_model(latent_size=16)
    saved(tmp_path / "large.pt", to_reference(large))
    shown = train(in_process, digits, "init_from=large.pt", "run_dir=x")
    assert "note: large.pt has latents of side 16 and this run of 8: all weights are taken over" in shown
    model = digits_model()
    load_starting_weights(model, "large.pt", GAUSSIAN)
    assert all(torch.equal(value, large.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.position_drift() == 0


@pytest.mark.parametrize("said", [None, 10, 9])
def test_a_runs_classes_choose_the_reading_of_a_label_table(tmp_path: Path, said: int | None) -> None:
    """Read 10 rows for a run of 10 classes as these classes without a null class, unless the trainer recorded 9."""
    weights = {**GOLDEN, TABLE: GOLDEN[TABLE][:10].clone()}
    arguments = {} if said is None else {"args": argparse.Namespace(num_classes=said)}
    path = saved(tmp_path / "a.pt", {"ema": weights, **arguments})
    model = DiT(DiTConfig(8, 4, 2, width=48, depth=2, num_heads=4, num_classes=10))
    fresh = model.label_embedding.weight.detach().clone()
    notes = " ".join(load_starting_weights(model, str(path), GAUSSIAN))
    if said == 9:
        assert "has 9 classes and this run 10: the label table starts anew" in notes
        assert torch.equal(model.label_embedding.weight, fresh)
        return
    assert ("the second is taken, since this run has 10 classes" in notes) == (said is None)
    assert "has no null class: its row of the label table starts anew" in notes
    assert torch.equal(model.label_embedding.weight[:10], weights[TABLE])
    assert torch.equal(model.label_embedding.weight[10], fresh[10])
    assert "label table" not in " ".join(load_starting_weights(model, str(saved(path, GOLDEN)), GAUSSIAN))


def test_a_run_of_another_variance_is_told_the_setting(digits: Path, tmp_path: Path, in_process: InProcess) -> None:
    """Follow the sentence's advice: it must not lead to another sentence that contradicts it."""
    saved(tmp_path / "fixed.pt", to_reference(digits_model(outputs_per_channel=1)))
    words = ["init_from=fixed.pt", "run_dir=x"]
    shown = train(in_process, digits, *words, expect=2)
    assert "The objective needs 2 output channels, but fixed.pt has 1" in shown
    assert "set diffusion/variance=fixed_large or fixed_small." in shown
    train(in_process, digits, *words, "diffusion/variance=fixed_large")


@pytest.mark.parametrize("job", ["sample", "export", "train"])
def test_no_kind_of_file_in_place_of_weights_makes_a_job_hang_or_crash(
    tmp_path: Path, digits: Path, job: str, in_process: InProcess
) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "device.pt").symlink_to("/dev/zero")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "transformer").mkdir()
    saved(tmp_path / "cut.pt", GOLDEN)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    kinds = {
        "fifo": "fifo is a named pipe, but it must be a file",
        "fifo.pt": "fifo.pt is a named pipe, but it must be a file",
        "device.pt": "device.pt is a device, but it must be a file",
        "empty.pt": "empty.pt is empty (0 bytes)",
        "folder.pt": "folder.pt is not the folder of a diffusers DiT or U-Net: it has no config.json",
        "folder": "folder",
        "loop": "loop is a link that leads back to itself, but it must be a file",
        ".": "transformer is not the folder of a diffusers DiT or U-Net: it has no config.json",
        "cut.pt": "cut.pt is cut short: it has 5000 bytes",
        "absent.pt": "There is no file absent.pt",
        "absent": "There is no checkpoint folder absent",
    }
    for where, words in kinds.items():
        if job == "train":
            shown = train(in_process, digits, f"init_from={where}", "run_dir=run", expect=2)
        else:
            more = ["to=reference", "out=x"] if job == "export" else ["out=x"]
            shown = in_process(job, f"checkpoint={where}", *more, expect=2)
        errors = [line for line in shown.splitlines() if "error:" in line]
        assert len(errors) == 1, shown
        assert words in errors[0], where


def test_released_weights_travel_through_export_and_back_bit_for_bit(tmp_path: Path, in_process: InProcess) -> None:
    weights = drifted(GOLDEN, 1.6e-4)
    saved(tmp_path / "a.pt", {"ema": weights, "args": argparse.Namespace(num_classes=10)})
    shown = in_process("export", "checkpoint=a.pt", "to=reference", "out=b.pt", HEADS)
    assert "its own is used" in shown
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    shown = in_process("export", "checkpoint=a.pt", "to=diffusers", "out=folder", HEADS)
    assert "diffusers' DiT uses the fixed position embedding, not this one, which differs by 0.00016" in shown
    in_process("export", "checkpoint=folder", "to=reference", "out=c.pt", "foreign.frequency_shift=0")
    again = torch.load(tmp_path / "c.pt", weights_only=True)
    assert all(torch.equal(again[name], value) for name, value in weights.items() if name != "pos_embed")
    assert from_reference(again, num_heads=4).position_drift() == 0
    shown = in_process("export", "checkpoint=folder", "to=reference", "out=d.pt")
    assert "the released code spaces the timestep's frequencies differently" in shown


def test_runs_and_checkpoints_of_ours_are_not_taken_for_foreign(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    train(in_process, digits, "run_dir=runs/mine")
    for where in ("runs/mine", "runs/mine/checkpoints/step_00000002", "gs://bucket/run", "nowhere", "a/b/c"):
        assert not is_foreign(where), where
    in_process("sample", "checkpoint=runs/mine", "runtime=cpu", "num_images=2", "sampler.steps=2")
    path = tmp_path / "runs/mine/checkpoints/step_00000002/ema.safetensors"
    shown = in_process("sample", f"checkpoint={path}", "out=x", expect=2)
    assert "ema.safetensors is part of a checkpoint of this program; give the folder that contains it" in shown
