"""Settings recorded in shards and checkpoints override defaults, so nothing is typed twice."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import InProcess, json_lines, prepared_by, resealed
from omegaconf import OmegaConf
from PIL import Image

from data.manifest import Manifest
from launch.builders.components import target_of
from launch.builders.data_settings import _of_manifest
from launch.command.app import CONF
from launch.plan import settle_by_data
from model.autoencoder import IdentityAutoencoder

SIZE = 8
OWN = [
    "data=folder",
    "data.name=mine",
    "data.source.root=images",
    f"data.image_size={SIZE}",
    "model/autoencoder=identity",
]
TINY = ["model.width=16", "model.depth=1", "model.num_heads=2", "model.patch_size=4", "runtime=cpu", "precision=fp32"]
SHORT = ["total_steps=2", "batch_size=8", "sample_every=null", "train/logger=none", "run_dir=run"]
FEW = ["evaluation.num_images=4", "sampler.steps=2", "evaluation.features.epochs=1", "runtime=cpu"]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images of one's own and their shards."""
    folder = tmp_path_factory.mktemp("own")
    dice = np.random.default_rng(0)
    for label in "ab":
        for number in range(10):
            path = folder / f"images/{label}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(dice.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    prepared_by("encode", *OWN, "data.shards=shards/mine", "data.samples_per_shard=7", cwd=folder)
    prepared_by("train", "data.shards=shards/mine", *TINY, *SHORT, cwd=folder)
    return folder


def test_the_place_of_the_shards_is_all_that_training_needs(encoded: Path) -> None:
    config = (encoded / "run/config.yaml").read_text()
    assert f"root: {encoded / 'images'}" in config
    assert json_lines(encoded / "run/metrics.jsonl")[-1]["step"] == 2


def test_shards_win_over_an_experiments_data_and_the_command_line_over_both(
    encoded: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoded)
    words = ["train", "data.shards=shards/mine", *TINY, *SHORT, "run_dir=other", "total_steps=1"]
    in_process(*words, "experiment=demo", "evaluate_every=null")
    shown = in_process(*words, "data.flip=false", "data.image_size=16", "data/crop=none", expect=2)
    assert "image_size is 8 and not 16" in shown
    assert "; to train on these: data.image_size=8 data/crop=center." in shown


def test_shards_of_an_earlier_version_say_all_but_their_source(encoded: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in (encoded / "shards/mine").iterdir():
        if path.name != "data.json" and path.is_file():
            (shards / path.name).write_bytes(path.read_bytes())
    prepared_by("train", "data.shards=shards", *TINY, *SHORT, cwd=tmp_path)
    assert "center" in json.loads((shards / "manifest.json").read_text())["spec"]["crop"]


@pytest.mark.parametrize("group", ["data/crop", "model/autoencoder"])
def test_a_manifest_alone_names_every_crop_and_autoencoder_that_has_a_config(encoded: Path, group: str) -> None:
    spec, key = Manifest.load(str(encoded / "shards/mine")).spec, group.split("/")[1]
    for path in (CONF / group).glob("*.yaml"):
        section = yaml.safe_load(path.read_text())
        name = section["name"] if "name" in section else target_of(section).name
        found = _of_manifest(replace(spec, **{key: name}))[key]
        assert found["_target_"] == section["_target_"]
        assert found.keys() == section.keys()
        assert found.get("channels", 3) == 3


class Halved(IdentityAutoencoder):
    """An autoencoder of half the side, without usual latents."""

    downscale = 2


def test_a_plan_takes_the_latent_size_from_the_autoencoders_class() -> None:
    autoencoder = {"_target_": f"{__name__}.Halved", "channels": 3}
    data = {"image_size": 16, "flip": False, "autoencoder": autoencoder}
    config = OmegaConf.create({"data": data, "model": {"latent_size": None, "channels": None}, "flip": True})
    settle_by_data(config, ["data=mine"])
    assert config.model == {"latent_size": 8, "channels": 3, "num_classes": 1000}
    assert not config.flip


def test_a_plan_takes_what_a_models_own_config_says_and_refuses_shards_of_another_size(encoded: Path) -> None:
    own = {"latent_size": 16, "channels": 32, "num_classes": None}
    autoencoder = {"_target_": f"{__name__}.Halved", "channels": 3}
    data = {"image_size": 16, "flip": False, "autoencoder": autoencoder, "name": "x", "shards": encoded / "shards/mine"}

    def settled(*words: str) -> dict[str, object]:
        config = OmegaConf.create({"data": data, "model": own, "flip": True, "num_samples": 1})
        settle_by_data(config, list(words))
        return dict(config.model)

    for words in ([], ["data=mine"]):
        assert settled(*words) == {**own, "num_classes": 1000}
    assert settled("data.shards=x", "model.latent_size=8", "model.channels=3")["num_classes"] == 2
    with pytest.raises(ValueError, match=r"model.latent_size is 16, but the shards have 8; choose another model"):
        settled("data.shards=x")


def test_a_plan_of_lightningdit_needs_no_size_of_its_latents_whatever_its_size(in_process: InProcess) -> None:
    shown = in_process("plan", "-m", "format=json", "model=lightningdit_xl1", "model/size=s,b", "diffusion=flow")
    rows = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    assert [round(row["gmacs"], 3) for row in rows] == [6.057, 23.008]
    assert [round(row["parameters_millions"], 1) for row in rows] == [33.0, 130.6]


def test_an_evaluation_of_ones_own_data_takes_them_from_the_checkpoint(encoded: Path, in_process: InProcess) -> None:
    """Evaluate from another folder, too."""
    shown = in_process("evaluate", f"checkpoint={encoded / 'run'}", *FEW, f"data.shards={encoded / 'shards/mine'}")
    assert '"reference_images": 20' in shown
    assert '"frechet_distance"' in in_process("evaluate", f"checkpoint={encoded / 'run'}", *FEW)


def test_an_evaluation_of_a_checkpoint_whose_source_is_foreign_is_refused(encoded: Path, in_process: InProcess) -> None:
    state = encoded / "run/checkpoints/step_00000002/state.json"
    before = state.read_text()
    config = json.loads(before)["config"]
    source = {"_target_": "os.mkdir", "path": "made"}
    resealed(state, config={**config, "data": {**config["data"], "source": source}})
    shown = in_process("evaluate", f"checkpoint={encoded / 'run'}", *FEW, expect=2)
    state.write_text(before)
    assert "data.source._target_ is 'os.mkdir'" in shown
    assert not Path("made").exists()


def test_verify_repairs_with_the_settings_of_the_encoding(
    encoded: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoded)
    tar = encoded / "shards/mine/shard-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1] + b"?")
    shown = in_process("verify", "data.shards=shards/mine", "repair=true")
    assert "shard-000001.tar has sha256" in shown
    assert tar.read_bytes() == whole


def test_a_damaged_record_of_the_settings_is_named(
    encoded: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoded)
    record = encoded / "shards/mine/data.json"
    whole = record.read_text()
    record.write_text(whole.replace('"image_size": 8', '"image_size": 9'))
    shown = in_process("train", "data.shards=shards/mine", *TINY, *SHORT, expect=2)
    record.write_text(whole)
    assert "data.json is damaged: its content has sha256" in shown
    assert "; delete it, and give these settings on the command line." in shown


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "data.json is a named pipe, but it must be a file; delete it"),
        (lambda path: path.mkdir(), "data.json is a folder, but it must be a file; delete it"),
        (lambda path: path.symlink_to("/etc/passwd"), "is a link out of shards/mine; put the file itself there"),
        (
            lambda path: path.write_bytes(b"[" * 10**6),
            "data.json is damaged: its brackets are nested too deeply",
        ),
    ],
    ids=["pipe", "folder", "link out", "brackets"],
)
def test_what_is_no_record_of_the_settings_is_named_and_not_waited_for(
    encoded: Path,
    in_process: InProcess,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], object],
    words: str,
) -> None:
    monkeypatch.chdir(encoded)
    record = encoded / "shards/mine/data.json"
    whole = record.read_bytes()
    record.unlink()
    make(record)
    shown = in_process("verify", "data.shards=shards/mine", expect=2)
    record.rmdir() if record.is_dir() else record.unlink()
    record.write_bytes(whole)
    assert words in shown
    assert "Traceback" not in shown


def test_a_plan_takes_shards_or_a_data_config_and_says_what_it_assumes(encoded: Path, in_process: InProcess) -> None:
    shown = in_process("plan", f"data.shards={encoded / 'shards/mine'}", "model.patch_size=4", "model.depth=1")
    assert "For 20 images of 2 classes (mine), latents 8x8x3, both orientations; 400,000 steps of 256;" in shown
    shown = in_process("plan", "data=digits", "model.patch_size=2", "flip=true", "model.depth=1")
    assert "(digits), latents 8x8x1, both orientations" in shown
    shown = in_process("plan", "model.depth=1")
    assert "For 1,281,167 images of 1,000 classes (imagenet), latents 32x32x4, both orientations;" in shown
    assert (
        "8 devices of 989 TFLOPs in bf16, at 40% utilization; 250 sampling steps; checkpoints at 1 GB/s, 30 s of "
        "notice of preemption. Each of these is a setting of plan." in shown
    )
