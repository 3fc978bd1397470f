"""Guidance acts in an interval of the objective's times, for every objective, in the first channels or in all."""

from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, InProcess
from sit import sit_flow
from torch import Tensor

from core.batch import Condition, Denoiser
from data.conditions import ClassLabels
from diffusion.edm import EDM
from diffusion.flow import Flow
from diffusion.guidance import Autoguidance, Channels, ClassifierFreeGuidance
from diffusion.objective import Objective
from diffusion.paths import GVPPath
from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.variances import FixedSmallVariance

NULL = ClassLabels(1).null
GAUSSIAN = GaussianDiffusion(LinearSchedule(), FixedSmallVariance())
STEPS, TIMES, LEVELS = [0, 299, 300, 500, 700, 701, 999], [0, 0.2, 0.25, 0.4, 0.65, 0.7, 1], [0.002, 0.1, 1, 5, 6, 80]
OBJECTIVES = [
    pytest.param(GAUSSIAN, STEPS, 300, 700, id="gaussian"),
    pytest.param(Flow(), TIMES, 0.25, 0.65, id="flow"),
    pytest.param(Flow(GVPPath()), TIMES, 0.25, 0.65, id="gvp"),
    pytest.param(sit_flow("Linear", "velocity"), TIMES, 0.25, 0.65, id="sit"),
    pytest.param(EDM(sigma_data=0.5), LEVELS, 0.1, 5, id="edm"),
]


def constant(value: float) -> Denoiser:
    """Return a network that gives one value for the condition and 2 for the null condition."""

    def network(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        values = torch.where(condition["label"] == 1, 2.0, value)
        return values.view(-1, 1, 1, 1).expand(-1, 4, 2, 2)

    return network


@pytest.mark.parametrize("channels", [3, "all"])
@pytest.mark.parametrize("kind", ["classifier_free", "autoguidance"])
@pytest.mark.parametrize(("objective", "times", "t_min", "t_max"), OBJECTIVES)
def test_guidance_acts_at_the_times_of_the_interval_and_no_others(
    objective: Objective, times: list[float], t_min: float, t_max: float, kind: str, channels: Channels
) -> None:
    network = constant(1.0)
    guided: Denoiser = ClassifierFreeGuidance(network, NULL, 4, 3.0, channels, t_min, t_max, objective)
    if kind == "autoguidance":
        guided = Autoguidance(network, NULL, 4, constant(2.0), 3.0, channels, t_min, t_max, objective)
    inside = [-1.0, -1.0, -1.0, 1.0 if channels == 3 else -1.0]  # 2 + 3 (1 - 2)
    for time in times:
        t = torch.tensor([time], dtype=torch.int64 if objective is GAUSSIAN else torch.float32)
        seen = objective.inputs(torch.zeros(1, 4, 2, 2), t)
        found = guided(*seen, {"label": torch.zeros(1, dtype=torch.int64)})[0, :, 0, 0].tolist()
        assert found == (inside if t_min <= time <= t_max else [1.0] * 4), time


@pytest.mark.parametrize(
    ("objective", "interval", "words"),
    [
        (GAUSSIAN, (0, 1000), "guidance.t_max is 1000, but the times of diffusion=gaussian are from 0 .* to 999 "),
        (Flow(), (0, 900), "guidance.t_max is 900, but the times of diffusion=flow are from 0 .data. to 1 .noise."),
        (Flow(), (-0.1, 1), "guidance.t_min is -0.1, but the times of diffusion=flow are from 0 .data. to 1 .noise."),
        (EDM(sigma_data=0.5), (-1, 5), "guidance.t_min is -1, but the times of diffusion=edm are from 0 .data. to inf"),
        (Flow(), (0.6, 0.4), r"guidance.t_max 0.4 is below guidance.t_min 0.6"),
    ],
)
def test_an_interval_outside_the_objectives_times_is_refused(
    objective: Objective, interval: tuple[float, float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ClassifierFreeGuidance(constant(1.0), NULL, 4, 2.0, "all", *interval, objective)
    with pytest.raises(ValueError, match=words):
        Autoguidance(constant(1.0), NULL, 4, constant(2.0), 2.0, "all", *interval, objective)


@pytest.mark.parametrize(("objective", "times"), [(p.values[0], p.values[1]) for p in OBJECTIVES])
def test_without_an_interval_guidance_acts_everywhere(objective: Objective, times: list[float]) -> None:
    guided = ClassifierFreeGuidance(constant(1.0), NULL, 4, 3.0, objective=objective)
    for time in times:
        t = torch.tensor([time], dtype=torch.int64 if objective is GAUSSIAN else torch.float32)
        seen = objective.inputs(torch.zeros(1, 4, 2, 2), t)
        assert (guided(*seen, {"label": torch.zeros(1, dtype=torch.int64)}) == -1).all(), time


def test_jobs_refuse_an_interval_of_steps_for_a_flow(tmp_path: Path, in_process: InProcess, digits: Path) -> None:
    words = ["diffusion=flow", "diffusion/sampler=euler", "diffusion/guidance=classifier_free", "guidance.t_max=900"]
    shown = in_process(
        "train", f"data.shards={digits}", "runtime=cpu", "train/logger=none", "run_dir=run", *words, expect=2
    )
    assert "guidance.t_max is 900, but the times of diffusion=flow are from 0 (data) to 1 (noise)" in shown


def test_a_guide_that_predicts_another_quantity_is_refused(tmp_path: Path, in_process: InProcess, digits: Path) -> None:
    words = ["train", *TINY_RUN, f"data.shards={digits}", "runtime=cpu", "total_steps=10"]
    in_process(*words, "run_dir=noise")
    in_process(*words, "run_dir=v", "diffusion/prediction=v")
    in_process(*words, "run_dir=cosine", "diffusion/schedule=cosine")
    in_process(*words, "run_dir=flow", "diffusion=flow", "diffusion/sampler=euler", "diffusion.outputs_per_channel=2")
    sample = ["sample", "runtime=cpu", "num_images=2", "sampler.steps=2", "diffusion/guidance=autoguidance", "out=x"]
    for guide, words_of_fact in (
        ("v", "the prediction v of an objective, but"),
        ("cosine", "another diffusion/schedule than the guided network"),
        ("flow", "the name flow of an objective, but"),
    ):
        shown = in_process(*sample, "checkpoint=noise", f"guidance.guide={guide}", expect=2)
        assert f"guidance.guide {guide} was trained with {words_of_fact}" in shown
    in_process(*sample, "checkpoint=noise", "guidance.guide=noise")


def test_a_guide_of_latents_that_are_normalized_otherwise_is_refused(
    tmp_path: Path, in_process: InProcess, digits: Path
) -> None:
    words = ["train", *TINY_RUN, f"data.shards={digits}", "runtime=cpu", "total_steps=10"]
    in_process(*words, "run_dir=plain")
    in_process(*words, "run_dir=normal", "data.normalize=true")
    sample = ["sample", "runtime=cpu", "num_images=2", "sampler.steps=2", "diffusion/guidance=autoguidance", "out=x"]
    for checkpoint, guide in (("plain", "normal"), ("normal", "plain")):
        shown = in_process(*sample, f"checkpoint={checkpoint}", f"guidance.guide={guide}", expect=2)
        assert f"guidance.guide {guide} was trained with other data.normalize, data.latent_mean or data.lat" in shown
    in_process(*sample, "checkpoint=normal", "guidance.guide=normal")
