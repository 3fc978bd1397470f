"""Runs of every objective train, continue, and record what they were trained on; runs of earlier versions continue."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import InProcess, json_lines, resealed

from data.manifest import Manifest
from data.sources import DigitsSource
from launch.builders.objectives import latent_facts
from model.autoencoder import IdentityAutoencoder
from model.normalized import NormalizedAutoencoder

SMALL = ["experiment=demo", "model.width=16", "model.depth=1", "model.num_heads=2", "model.patch_size=4"]
SMALL += ["batch_size=16", "log_every=5", "checkpoint_every=10", "sample_every=null", "evaluate_every=null"]
SMALL += ["train/logger=none", "train/ema=shorter_run", "runtime=cpu", "optimizer.lr=4e-3"]
EULER = ["diffusion/sampler=euler", "sampler.steps=2"]
HEUN = ["diffusion/sampler=edm_heun", "sampler.steps=3"]
LOGIT_NORMAL = ["diffusion=flow", "diffusion/times=logit_normal", *EULER]
MODERN = [
    "model/block=adaln_zero_unshifted",
    "model/norm=rms",
    "model/mlp=swiglu",
    "model/attention=rotary_qk_rms_norm",
]
RUNS = {
    "v, min-SNR": ["diffusion/prediction=v", "diffusion/weighting=min_snr", "sampler.steps=2"],
    "logit-normal": [*LOGIT_NORMAL, "diffusion.direction_weight=1", "diffusion.shift=resolution"],
    "VP, score": ["diffusion=flow", "diffusion/path=vp", "diffusion/prediction=score", *EULER],
    "EDM": ["diffusion=edm", *HEUN],
    "modern parts": ["diffusion=flow", *EULER, *MODERN],
}
METRICS = {name: set[str]() for name in RUNS} | {"v, min-SNR": {"mse", "vlb"}, "logit-normal": {"mse", "direction"}}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_stops_halfway_ends_with_the_same_bits(
    name: str, digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = [*SMALL, f"data.shards={digits}", *RUNS[name]]
    in_process("train", *words, "run_dir=whole", "total_steps=20")
    in_process("train", *words, "run_dir=run", "total_steps=10")
    in_process("train", *words, "run_dir=run", "total_steps=20", "resume.allow=[total_steps]")
    lines = json_lines(tmp_path / "run/metrics.jsonl")
    assert lines == json_lines(tmp_path / "whole/metrics.jsonl")
    assert lines[0].keys() & {"mse", "vlb", "direction"} == METRICS[name]
    last = "checkpoints/step_00000020/model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
    sampler = [word for word in words if "sampler" in word]
    in_process("sample", "checkpoint=run", *sampler, "num_images=2", "out=x", "runtime=cpu")


def state_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(max((run / "checkpoints").glob("step_*/state.json")).read_text())
    return found


def test_edm_takes_the_deviation_of_the_latents_from_the_shards_unless_given_and_the_record_says_which(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    pixels = np.stack([example.content for example in DigitsSource()]).astype(np.float64) / 127.5 - 1
    words = [*SMALL, f"data.shards={digits}", "diffusion=edm", *HEUN, "total_steps=5", "checkpoint_every=5"]
    evaluated = ["evaluation.num_images=20", "evaluation.features.epochs=1", "runtime=cpu", *HEUN]
    for name, given, origin in (("shards", [], "shards"), ("given", ["diffusion.sigma_data=0.5"], "config")):
        in_process("train", *words, *given, f"run_dir={name}")
        objective = state_of(tmp_path / name)["config"]["diffusion"]
        assert objective["sigma_data_from"] == origin
        assert objective["sigma_data"] == (0.5 if given else pytest.approx(pixels.std(), rel=1e-3))
        in_process("evaluate", f"checkpoint={name}", *evaluated)
        record = json_lines(tmp_path / name / "evaluations.jsonl")[-1]["objective"]
        assert record["name"] == "edm"
        assert (record["sigma_data"], record["sigma_data_from"]) == (objective["sigma_data"], origin)
    shown = in_process("train", *words, "diffusion.sigma_data=0.5", "run_dir=shards", "total_steps=6", expect=2)
    assert "sigma_data" in shown


def test_facts_on_latents_follow_the_autoencoders_scale_and_normalization(digits: Path) -> None:
    manifest, plain = Manifest.load(str(digits)), IdentityAutoencoder(1)
    facts = latent_facts(manifest, plain)
    assert facts.dimension == 64
    assert facts.std == pytest.approx(manifest.latent_std[0], rel=1e-3)
    normalized = NormalizedAutoencoder(plain, manifest.latent_mean, manifest.latent_std)
    assert latent_facts(manifest, normalized).std == pytest.approx(1, rel=1e-3)


def test_a_plan_needs_no_statistics(in_process: InProcess) -> None:
    costs = [json.loads(in_process("plan", "diffusion=edm", "format=json", *more)) for more in ([], ["model.depth=2"])]
    assert costs[0]["gmacs"] > costs[1]["gmacs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["diffusion/weighting=min_snr", "diffusion.weighting.gamma=0.0"], "diffusion.weighting.gamma is 0.0"),
        (["diffusion/prediction=velocity"], "diffusion/prediction=velocity needs a path that is continuous in time"),
        (["diffusion=edm", "diffusion/times=logit_normal", *HEUN], "diffusion=edm trains on noise levels"),
        (["diffusion=flow", "diffusion/times=log_normal", *EULER], "diffusion=flow needs times between 0 and 1"),
        (["diffusion/path=gvp"], "The option of diffusion=... has no diffusion/path; leave diffusion/path out."),
        (["diffusion=edm", "diffusion/prediction=v"], "The option of diffusion=... has no diffusion/prediction"),
        (["diffusion=edm"], "sampler ddpm needs diffusion=gaussian, but the objective is diffusion=edm"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_run_begins(
    words: list[str], message: str, digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    shown = in_process("train", *SMALL, f"data.shards={digits}", *words, "total_steps=5", "run_dir=run", expect=2)
    assert message in shown
    assert not (tmp_path / "run").exists()


def test_a_flow_run_of_an_earlier_version_continues(digits: Path, tmp_path: Path, in_process: InProcess) -> None:
    """Put the sections that earlier versions wrote into the folder's config and the checkpoint."""
    words = [*SMALL, f"data.shards={digits}", "diffusion=flow", *EULER]
    in_process("train", *words, "run_dir=whole", "total_steps=20")
    in_process("train", *words, "run_dir=run", "total_steps=10")
    earlier = {"_target_": "diffusion.flow.StraightFlow"}
    folder_config, state_file = tmp_path / "run/config.yaml", tmp_path / "run/checkpoints/step_00000010/state.json"
    config = yaml.safe_load(folder_config.read_text())
    assert config["diffusion"] != earlier
    assert config["model"].pop("position_table") == "fixed"
    assert config["model"].pop("residual") == "fp32"
    assert config["data"].pop("split") is None
    assert config["evaluation"].pop("source") is None
    assert config["evaluation"]["features"].pop("test_source") is None
    then = {"diffusion": earlier, **{section: config[section] for section in ("model", "data", "evaluation")}}
    folder_config.write_text(yaml.safe_dump(config | then))
    resealed(state_file, config=state_of(tmp_path / "run")["config"] | then)
    in_process("sample", "checkpoint=run", *EULER, "num_images=2", "out=x", "runtime=cpu")
    in_process("train", *words, "run_dir=run", "total_steps=20", "resume.allow=[total_steps]")
    assert json_lines(tmp_path / "run/metrics.jsonl") == json_lines(tmp_path / "whole/metrics.jsonl")
