"""The experiments with U-Nets compare what they say: networks of equal compute, and figure 2 in one protocol."""

import re

import pytest
import torch
from omegaconf import OmegaConf
from test_house import composed

from launch.builders.components import build
from launch.command.app import CONF
from model.flops import multiply_adds
from model.network import Network


def choices(experiment: str, group: str) -> list[str]:
    swept = OmegaConf.load(CONF / f"experiment/{experiment}.yaml").hydra.sweeper.params
    names = str(swept[group]).split(",")
    assert {path.stem for path in (CONF / group).glob("*.yaml")} == set(names)
    return names


def test_the_demo_of_u_nets_trains_two_sizes_of_three_families_and_differs_in_the_network_alone() -> None:
    group = "experiment/demo/network"
    names = choices("demo/unets", group)
    assert OmegaConf.load(CONF / "experiment/demo/unets.yaml").hydra.sweeper.params.seed == "0,1,2"
    assert sorted(names) == ["adm_1", "adm_5", "dit_1", "dit_5", "ldm_1", "ldm_5"]
    runs = {name: composed("train", "experiment=demo/unets", f"{group}={name}") for name in names}
    differing = {key for run in runs.values() for key in run if run[key] != runs["dit_1"][key]}
    assert differing == {"model"}


@pytest.mark.parametrize(("size", "mmacs"), [("1", 1.3), ("5", 4.9)])
def test_networks_of_the_demo_that_are_compared_take_equally_many_multiply_adds(size: str, mmacs: float) -> None:
    for family in ("dit", "adm", "ldm"):
        run = composed("train", "experiment=demo/unets", f"experiment/demo/network={family}_{size}")
        data = {"latent_size": 8, "channels": 1, "num_classes": 10, "outputs_per_channel": 2}
        with torch.device("meta"):
            network: Network = build({**run["model"], **data})
        assert multiply_adds(network) / 1e6 == pytest.approx(mmacs, rel=0.08), family


def test_figure_2s_networks_train_in_one_protocol_on_latents_of_their_own() -> None:
    group = "experiment/paper/network"
    runs = {
        name: composed("train", "experiment=paper/unets", f"{group}={name}") for name in choices("paper/unets", group)
    }
    assert list(runs) == ["xl2", "adm", "ldm4"]
    assert len({run["data"]["shards"] for run in runs.values()}) == 3
    for run in runs.values():
        assert {key for key in run if run[key] != runs["xl2"][key]} <= {"model", "data", "activation_checkpointing"}
    of_data = {key for run in runs.values() for key in run["data"] if run["data"][key] != runs["xl2"]["data"][key]}
    assert of_data == {"shards", "autoencoder"}
    for name, downscale in (("adm", 1), ("ldm4", 4)):
        assert runs[name]["model"]["latent_size"] * downscale == runs[name]["data"]["image_size"] == 256
        assert runs[name]["model"]["null_class"]


def test_the_head_of_figure_2s_experiment_has_the_hours_of_its_gflops() -> None:
    """The Gflops are those that tests of each network count; a plan of each would take seconds."""
    head = (CONF / "experiment/paper/unets.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
    number = r"([\d.]+)"
    three = f"{number}, {number} and {number}"
    gflops, hours, exaflops, evaluation = (
        [float(text) for text in re.findall(pattern, head)[0]]
        for pattern in (f"Gflops {three}", f"{three} hours of training", rf"\({three} EFLOPs", f"{three} of evaluation")
    )
    run = composed("train", "experiment=paper/unets")
    images = run["total_steps"] * run["batch_size"]
    sampled = run["total_steps"] // run["evaluate_every"] * run["evaluation"]["num_images"] * run["sampler"]["steps"]
    a_second = 8 * 989e12 * 0.4
    for one in zip(gflops, hours, exaflops, evaluation, strict=True):
        training, measuring = (2e9 * one[0] * number for number in (3 * images, sampled))
        assert training / 1e18 == pytest.approx(one[2], abs=0.5)
        assert training / a_second / 3600 == pytest.approx(one[1], abs=0.06)
        assert measuring / a_second / 3600 == pytest.approx(one[3], abs=0.06)
