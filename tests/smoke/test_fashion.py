"""The studies on Fashion-MNIST work end to end in short, and their configs say what they compare and what it costs."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import InProcess, ditscale, json_lines
from idx_files import FASHION, needs_fashion, write_split
from omegaconf import OmegaConf
from test_house import composed

from data.idx import FashionMnist
from data.sources import load_images
from launch.builders.components import build
from launch.command.app import CONF
from model.flops import multiply_adds
from model.network import Network

STUDIES = ("scaling", "sampling", "blocks", "objectives", "unets")
LATENTS = {"latent_size": 28, "channels": 1, "num_classes": 10}
SWEEP = [
    "experiment=fashion/scaling",
    "model/size=fashion_b,fashion_s",
    "model.patch_size=7",
    "seed=0",
    "total_steps=30",
    "log_every=10",
    "checkpoint_every=15",
    "sample_every=30",
    "evaluate_every=15",
    "sampler.steps=5",
    "evaluation.num_images=500",
    "evaluation.features.epochs=1",
    "runtime.compile=false",  # a minute of a compiler
    "train/logger=none",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a study of two models on the first 1,000 and 500 images of the two splits."""
    folder = tmp_path_factory.mktemp("fashion")
    for split, count in (("train", 1000), ("test", 500)):
        images, labels = load_images(FashionMnist(str(FASHION), split), 28)
        write_split(folder / "images", split, images[:count, ..., 0], labels[:count].astype(np.uint8))
    ditscale("encode", "data=fashion_mnist", "data.source.root=images", cwd=folder)
    ditscale("train", "-m", *SWEEP, cwd=folder)
    ditscale("report", "sweep=runs/fashion-scaling", "runtime=cpu", "sampler.steps=5", "train/logger=none", cwd=folder)
    return folder


@needs_fashion
def test_a_short_study_measures_on_the_test_split_over_training(study: Path) -> None:
    runs = sorted(path.parent for path in study.glob("runs/fashion-scaling/*/config.yaml"))
    assert [run.name for run in runs] == [f"d64-n{depth}-p7-adaln_zero-seed0" for depth in (2, 3)]
    for run in runs:
        lines = json_lines(run / "evaluations.jsonl")
        assert [line["step"] for line in lines] == [15, 30]
        for line in lines:
            assert line["frechet_distance"] > 0
            assert (line["reference"], line["reference_images"], line["classifier_held_out"]) == (
                "fashion_mnist",
                500,
                500,
            )
            assert line["classifier_accuracy"] > 0.3  # chance is 0.1
    assert "fashion_mnist classifier features" in (study / "runs/fashion-scaling/report/report.html").read_text()


@needs_fashion
def test_a_finished_study_trains_nothing_again(study: Path) -> None:
    paths = list(study.glob("runs/fashion-scaling/*/evaluations.jsonl"))
    before = [path.read_bytes() for path in paths]
    ditscale("train", "-m", *SWEEP, cwd=study)
    assert [path.read_bytes() for path in paths] == before


def params(name: str) -> dict[str, list[str]]:
    swept = OmegaConf.load(CONF / f"experiment/fashion/{name}.yaml").hydra.sweeper.params
    return {key: str(values).split(",") for key, values in swept.items()}


@pytest.mark.parametrize("name", STUDIES)
def test_studies_share_the_recipe_and_measure_10000_samples_of_50_steps_on_the_test_split(name: str) -> None:
    config = composed("train", f"experiment=fashion/{name}")
    assert (config["evaluation"]["num_images"], config["sampler"]["steps"]) == (10_000, 50)
    source, test = (config["evaluation"]["features"][key]["split"] for key in ("source", "test_source"))
    assert (config["data"]["source"]["split"], source) == ("train", "train")
    assert (config["evaluation"]["source"]["split"], test) == ("test", "test")
    recipe = composed("train", "experiment=fashion/recipe")
    same = ("total_steps", "batch_size", "optimizer", "ema", "class_dropout", "data", "precision", "checkpoint_every")
    assert {key for key in same if config[key] != recipe[key]} == set()
    assert config["total_steps"] % config["evaluate_every"] == 0


def test_each_study_trains_the_runs_that_it_says() -> None:
    assert [len(params("scaling")[key]) for key in ("model/size", "model.patch_size", "seed")] == [4, 3, 3]
    assert len(params("blocks")["model/block"]) == 4
    assert {path.stem for path in (CONF / "experiment/demo/objective").glob("*.yaml")} == set(
        params("objectives")["experiment/demo/objective"]
    )
    for name, group in (("unets", "network"), ("sampling", "extreme")):
        files = {path.stem for path in (CONF / f"experiment/fashion/{group}").glob("*.yaml")}
        assert files == set(params(name)[f"experiment/fashion/{group}"])
    assert all(params(name)["seed"] == ["0", "1", "2"] for name in STUDIES)


@pytest.mark.parametrize(("name", "words"), [("largest", ("xl", 2)), ("smallest", ("s", 7))])
def test_the_models_of_the_sampling_study_are_runs_of_the_scaling_study(name: str, words: tuple[str, int]) -> None:
    size, patch = words
    scaling = composed("train", "experiment=fashion/scaling", f"model/size=fashion_{size}", f"model.patch_size={patch}")
    assert composed("train", "experiment=fashion/sampling", f"experiment/fashion/extreme={name}") == scaling


def test_gflops_rise_with_size_and_tokens_and_u_nets_have_those_of_their_dit() -> None:
    def cost(*words: str) -> float:
        section = composed("train", *words)["model"]
        with torch.device("meta"):
            network: Network = build({**section, **LATENTS, "outputs_per_channel": 2})
        return multiply_adds(network) / 1e6

    sizes, patches = ("s", "b", "l", "xl"), ("7", "4", "2")
    grid = [
        [cost("experiment=fashion/scaling", f"model/size=fashion_{s}", f"model.patch_size={p}") for s in sizes]
        for p in patches
    ]
    for line in [*grid, *zip(*grid, strict=True)]:
        assert all(1.3 * a < b for a, b in itertools.pairwise(line))
    networks = {
        name: cost("experiment=fashion/unets", f"experiment/fashion/network={name}") for name in ("dit", "adm", "ldm")
    }
    for name, macs in networks.items():
        assert macs == pytest.approx(networks["dit"], rel=0.08)
        head = (CONF / f"experiment/fashion/network/{name}.yaml").read_text(encoding="utf-8")
        assert f"{macs:.1f} MMACs" in head


def test_the_plan_in_the_head_of_the_scaling_study_is_of_its_models(in_process: InProcess) -> None:
    head = (CONF / "experiment/fashion/scaling.yaml").read_text(encoding="utf-8")
    (line,) = (line for line in head.splitlines() if "ditscale plan -m" in line)
    words = line.split("ditscale ")[1].split()
    shown = in_process(*words, "format=json", "hydra.sweep.dir=.")
    rows = [json.loads(row) for row in shown.splitlines() if row.startswith("{")]
    assert len(rows) == 12
    assert {word for word in words if word.startswith(("model/size", "model.patch"))} == {
        f"{key}={','.join(params('scaling')[key])}" for key in ("model/size", "model.patch_size")
    }
