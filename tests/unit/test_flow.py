"""A second objective works behind the interface: flow matching on straight lines, with Euler's method."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import InProcess, json_lines
from test_model import tiny
from torch import Tensor

from core.batch import Batch, Condition, Denoiser
from core.draws import Philox, Purpose
from diffusion.flow import Flow
from diffusion.objective import corrupt, predict
from diffusion.ode_samplers import Euler
from diffusion.process import GaussianDiffusion
from diffusion.samplers import DDPM, Sampler
from diffusion.schedules import LinearSchedule
from diffusion.times import UniformTimes
from diffusion.variances import LearnedRangeVariance

MEAN, STD = 0.4, 0.5


def perfect_velocity() -> Denoiser:
    """Return the exact velocity for x_0 ~ N(m, s^2).

    E[noise - x_0 | x_t] = -m + (t - (1 - t) s^2) (x_t - (1 - t) m) / ((1 - t)^2 s^2 + t^2).
    """

    def network(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
        return -MEAN + slope * (x_t - (1 - t) * MEAN)

    return network


def test_a_perfect_network_has_the_least_loss_and_predicts_the_conditional_means() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0 = MEAN + STD * torch.randn(2000, 1, 4, 4, generator=generator)
    noise, t = torch.randn(x_0.shape, generator=generator), torch.rand(2000, generator=generator)
    flow, batch = Flow(), Batch(x_0, noise, t, {})
    x_t = corrupt(flow, batch)
    output = perfect_velocity()(x_t, t, {})
    best = flow.losses(output, batch, x_t)["loss"].mean()
    assert best < flow.losses(output + 0.1, batch, x_t)["loss"].mean()
    assert best < flow.losses(0.9 * output, batch, x_t)["loss"].mean()
    predicted = predict(perfect_velocity(), flow, x_t, t, {})
    alpha, sigma = flow.alpha_sigma(t)
    torch.testing.assert_close(alpha * predicted.x_0 + sigma * predicted.noise, x_t)
    assert (predicted.x_0 - x_0).mean().abs() < 0.01  # unbiased
    assert (predicted.noise - noise).mean().abs() < 0.01


def test_eulers_method_converges_to_the_exact_solution_with_order_one() -> None:
    """Compare with m + s z, since the flow takes a Gaussian to a Gaussian and keeps the order of points."""
    z = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    errors = []
    for steps in (10, 20, 40, 80):
        found = Euler(steps)(perfect_velocity(), Flow(), lambda _: z, {})
        errors.append((found - (MEAN + STD * z)).abs().max().item())
    assert errors[-1] < 0.02
    assert 0.85 < np.log2(errors[0] / errors[-1]) / 3 < 1.2


SAMPLERS = [Euler(6)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_flows_sampler_says_how_often_it_calls_the_network(sampler: Sampler) -> None:
    times: list[float] = []

    def counted(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        times.append(t[0].item())
        return perfect_velocity()(x_t, t, condition)

    sampler.require(Flow())
    sampler(counted, Flow(), lambda _: torch.randn(2, 1, 4, 4), {})
    assert len(times) == sampler.calls()
    assert times[0] == 1
    assert 0 <= min(times) < max(times)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_flows_sampler_reads_nothing_back_from_the_device(sampler: Sampler) -> None:
    """Sample on the meta device, where reading a value raises."""
    model = tiny(outputs_per_channel=1).to("meta")
    condition = {"label": torch.zeros(2, dtype=torch.int64, device="meta")}
    sample = sampler(model, Flow(), lambda _: torch.empty(2, 4, 8, 8, device="meta"), condition)
    assert sample.shape == (2, 4, 8, 8)
    assert sample.is_meta


def test_times_depend_on_the_position_alone_and_lie_below_one() -> None:
    philox, times = Philox(3), UniformTimes()
    drawn = np.array([times.draw(philox.at(p, Purpose.TIMESTEP)) for p in range(4000)], dtype=times.dtype)
    assert drawn.dtype == np.float32
    assert (drawn >= 0).all()
    assert (drawn < 1).all()
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)
    assert np.float32(times.draw(Philox(3).at(17, Purpose.TIMESTEP))) == drawn[17]


def test_a_sampler_names_the_objective_that_it_needs() -> None:
    with pytest.raises(ValueError, match="sampler ddpm needs diffusion=gaussian, but the objective is diffusion=flow"):
        DDPM().require(Flow())
    gaussian = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
    with pytest.raises(ValueError, match="sampler euler needs an objective with a velocity, such as diffusion=flow"):
        Euler().require(gaussian)
    with pytest.raises(ValueError, match=r"sampler.steps is 0"):
        Euler(0)


WORDS = [
    "diffusion=flow",
    "diffusion/sampler=euler",
    "sampler.steps=8",
    "model/size=digits_s",
    "model.patch_size=4",
    "optimizer.lr=4e-3",
    "runtime=cpu",
    "train/logger=none",
    "run_dir=run",
]


def test_a_flow_is_trained_resumed_sampled_and_measured_on_digits(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = [*WORDS, f"data.shards={digits}", "batch_size=64", "log_every=10", "evaluate_every=null"]
    words += ["sample_every=30", "checkpoint_every=30", "train/ema=shorter_run", "precision=fp32"]
    in_process("train", *words, "total_steps=60")
    lines = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert not {"mse", "vlb"} & lines[0].keys()
    assert all(f"loss_t_quarter_{quarter}" in lines[0] for quarter in (1, 2, 3, 4))
    half = [word.replace("run_dir=run", "run_dir=half") for word in words]
    in_process("train", *half, "total_steps=30")
    in_process("train", *half, "total_steps=60", "resume.allow=[total_steps]")
    assert json_lines(tmp_path / "half" / "metrics.jsonl") == lines

    in_process("sample", "checkpoint=run", "diffusion/sampler=euler", "sampler.steps=4", "num_images=4", "out=x")
    shown = in_process("sample", "checkpoint=run", "num_images=4", "out=y", expect=2)
    assert "sampler ddpm needs diffusion=gaussian, but the objective is diffusion=flow" in shown
    how = ["diffusion/sampler=euler", "sampler.steps=4", "evaluation.num_images=20", "evaluation.features.epochs=1"]
    in_process("evaluate", "checkpoint=run", *how, "diffusion/guidance=classifier_free", "runtime=cpu")
    record = json_lines(tmp_path / "run" / "evaluations.jsonl")[-1]
    assert record["sampler"] == {"name": "euler", "steps": 4}
    assert record["network_calls"] == 4
    assert record["sampling_gmacs"] == pytest.approx(8 * record["gmacs"])
    shown = in_process("export", "checkpoint=run", "to=diffusers", "out=pipeline", expect=2)
    assert "to=diffusers needs diffusion=gaussian" in shown
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("*60/state.json")).read_text())
    assert state["config"]["diffusion"]["_target_"] == "diffusion.flow.Flow"
