"""The config of a checkpoint or dump is untrusted: it builds known components from plain values, or is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_RUN, InProcess, prepared_by, resealed
from test_house import composed

from data.settings import DataSettings
from launch.builders.components import build_saved, components, from_file
from launch.builders.saved_configs import REPLAYED, component, setting, whole_config

STATE = "run/checkpoints/step_00000002/state.json"
SIZES = {"latent_size": 8, "channels": 1, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
BLOCK = {"_target_": "model.blocks.AdaLNZeroBlock", "_partial_": True, "mlp_ratio": 4.0}
MODEL = {"_target_": "model.dit.DiT", **SIZES, "block": BLOCK}
MAKES_A_FOLDER = "${oc.create:{_target_:os.mkdir,path:made}}"


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of two steps, and a diverged one with a dump."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["train", *TINY_RUN, f"data.shards={digits}", "total_steps=2", "checkpoint_every=2"]
    prepared_by(*words, "run_dir=run", cwd=folder)
    prepared_by(*words, "run_dir=diverged", "optimizer.lr=1e30", cwd=folder, expect=1)
    return folder


@pytest.fixture
def there(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "diverged", tmp_path / "diverged")
    monkeypatch.chdir(tmp_path)
    return tmp_path


JOBS = {
    "sample": ["sample", "checkpoint=run", "runtime=cpu", "num_images=2", "sampler.steps=2", "out=x"],
    "evaluate": ["evaluate", "checkpoint=run", "runtime=cpu", "evaluation.num_images=2", "sampler.steps=2"],
    "export": ["export", "checkpoint=run", "to=reference", "out=x.pt"],
    "init_from": ["train", *TINY_RUN, "init_from=run", "run_dir=other"],
}


def change(file: Path, at: str, value: Any) -> None:
    """Put a value at a dotted path of the config in a sealed record."""
    config = json.loads(file.read_text())["config"]
    *path, name = at.split(".")
    into = config
    for part in path:
        into = into[part]
    into[name] = value
    resealed(file, config=config)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("model.block", "${oc.create:{_target_:sympy.sympify,a:__import__('os').mkdir('made')}}"),
        ("model.block", MAKES_A_FOLDER),
        ("model.learn_sigma", MAKES_A_FOLDER),
        ("model", {"_target_": "data.hugging_face.ParquetImages", "root": "http://127.0.0.1:1/x"}),
        ("model", {"_target_": "os.mkdir", "path": "made"}),
        ("model.block", {"_target_": "train.loggers.WandbLogger", "_partial_": True}),
        ("model.block._args_", [1]),
        ("model.block._partial_", False),
        ("model.block.attention", ["${oc.env:SECRET}"]),
        ("model.width", "${oc.env:SECRET}"),
    ],
)
def test_a_checkpoints_config_runs_no_code_and_tells_no_secret(
    job: str, at: str, value: Any, there: Path, in_process: InProcess, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    change(there / STATE, at, value)
    shards = [f"data.shards={digits}"] if job in ("init_from", "evaluate") else []
    shown = in_process(*JOBS[job], *shards, expect=2)
    assert "state.json" in shown
    assert not (there / "made").exists()
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("data.autoencoder.channels", MAKES_A_FOLDER),
        ("data.autoencoder", {"_target_": "model.dit.DiT", **SIZES}),
        ("diffusion.schedule", {"_target_": "diffusion.variances.LearnedRangeVariance"}),
        ("diffusion.schedule.num_steps", 10**9),
        ("diffusion.schedule.beta_end", 1e308),
        ("batch_size", "64"),
        ("class_dropout", None),
        ("seed", "${oc.env:SECRET}"),
        ("model.depth", 10**9),
        ("model.depth", 3),
        ("model.width", 2**15),
        ("model.block.mlp_ratio", 1e300),
        ("model.num_classes", 10**7),
        ("model.latent_size", 4096),
        ("diffusion", None),
        ("data", []),
    ],
)
def test_a_config_of_another_model_or_of_none_is_one_sentence_that_names_the_file(
    at: str, value: Any, there: Path, in_process: InProcess
) -> None:
    change(there / STATE, at, value)
    shown = in_process(*JOBS["sample"], expect=2)
    assert "run/checkpoints/step_00000002" in shown
    assert shown.count("error: ") == 1
    assert not (there / "made").exists()


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("optimizer", {"_target_": "os.mkdir", "path": "made"}),
        ("optimizer.lr", MAKES_A_FOLDER),
        ("optimizer.betas", [0.9]),
        ("ema", MAKES_A_FOLDER),
        ("runtime", {"_target_": "evaluation.image_files.NpzFile", "path": "x.npz"}),
        ("data.order", {"_target_": "data.sources.DigitsSource"}),
        ("data.crop", "${oc.env:SECRET}"),
        ("total_steps", "many"),
        ("precision", "fp3"),
        ("name", MAKES_A_FOLDER),
        ("data.shards", MAKES_A_FOLDER),
    ],
)
def test_a_dumps_config_builds_what_training_builds_and_nothing_else(
    at: str, value: Any, there: Path, in_process: InProcess
) -> None:
    (dump,) = there.glob("diverged/nonfinite_*")
    change(dump / "dump.json", at, value)
    shown = in_process("train", f"replay={dump.relative_to(there)}", expect=2)
    assert "dump.json" in shown
    assert not (there / "made").exists()


def test_a_command_lines_betas_are_two(in_process: InProcess, digits: Path) -> None:
    shown = in_process("train", *TINY_RUN, f"data.shards={digits}", "optimizer.betas=[0.9]", expect=2)
    assert "optimizer.betas is [0.9], but it has no value at 1." in shown


def test_every_place_of_a_composed_config_is_a_place_of_the_table() -> None:
    config = composed("train", "model/block=in_context", "model/attention=qk_norm", "data/text_encoder=clip")
    for place in REPLAYED:
        assert component(config, place, "x")["_target_"] in components()[place]
    assert whole_config(config, "x")["model"] == config["model"]
    assert setting(config, "batch_size", "x") == 256


def test_a_component_is_allowed_at_its_own_place_only() -> None:
    assert from_file(MODEL, "model", "state.json") == MODEL
    for place in ("optimizer", "data.autoencoder", "model.block", "nowhere", ""):
        with pytest.raises(ValueError, match=r"which a checkpoint may not ask for at that place"):
            from_file(MODEL, place, "state.json")


@pytest.mark.parametrize(
    ("change_", "reason"),
    [
        (lambda c: c | {"depth": [{"_target_": "os.mkdir"}]}, "only plain values"),
        (lambda c: c | {"dept": 2}, "has no setting model.dept; did you mean 'depth'"),
        (lambda c: c | {"depth": "2"}, "model.depth is '2', but"),
        (lambda c: c | {"depth": True}, "model.depth is True, but"),
        (lambda c: c | {"_convert_": "all"}, "model._convert_ is given"),
        (lambda c: c | {"block": BLOCK | {"_recursive_": False}}, "model.block._recursive_ is given"),
        (lambda c: c | {"block": {"_target_": "model.blocks.AdaLNZeroBlock"}}, "model.block._partial_ is missing"),
        (lambda c: [c], "no component at model"),
        (lambda c: c | {"_target_": ["model.dit.DiT"]}, "which a checkpoint may not ask for"),
        (lambda c: c | {"depth": "${x}"}, "without interpolations"),
        (lambda c: c | {"depth": "x" * 10**6}, "plain text"),
    ],
)
def test_what_no_config_of_ours_says_is_refused(change_: Callable[[dict[str, Any]], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_file(change_(MODEL), "model", "state.json")


def test_numbers_that_no_constructor_expects_name_the_file() -> None:
    with pytest.raises(ValueError, match=r"^state.json asks for a model.dit.DiT that cannot be built"):
        build_saved(MODEL | {"width": 10**30}, "state.json")


def test_the_data_of_a_dump_may_have_a_split_without_its_source_and_of_earlier_versions_no_split() -> None:
    config = composed("train", "data=fashion_mnist")
    data = DataSettings.of(whole_config(config, "a dump")["data"])
    assert (data.split, data.source) == ("train", "???")
    del config["data"]["split"]
    assert DataSettings.of(whole_config(config, "a dump")["data"]).split is None
