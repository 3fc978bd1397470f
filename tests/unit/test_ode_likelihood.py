"""The likelihood by the ODE is the closed form for Gaussian data, whichever objective has the network."""

import math
from pathlib import Path

import pytest
import torch
from conftest import InProcess, json_lines
from test_samplers import MEAN, STD, perfect
from torch import Tensor

from core.batch import Condition
from diffusion.continuous import ContinuousObjective
from diffusion.edm import EDM
from diffusion.flow import Flow
from diffusion.likelihood import ode_bits_per_dimension
from diffusion.paths import GVPPath, VPPath
from diffusion.predictions import PredictNoise

BIN = math.log2(2 / 255)


def signs(seed: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_gaussian(x: Tensor) -> Tensor:
    """Return -log2 of N(m, s^2) at x, the mean over the dimensions of each row, in bins of 2 / 255."""
    log_density = -0.5 * ((x - MEAN) / STD) ** 2 - math.log(STD) - 0.5 * math.log(2 * math.pi)
    return -log_density.flatten(1).mean(1) / math.log(2) - BIN


@pytest.mark.parametrize(
    ("objective", "tolerance"),
    [
        (Flow(), 1e-3),
        (Flow(GVPPath()), 1e-3),
        (Flow(reversed_time=True, outputs_per_channel=2), 1e-3),
        (Flow(prediction=PredictNoise()), 5e-3),  # it ends at t = 0.001
        (EDM(sigma_data=0.5), 5e-3),
        (Flow(VPPath()), 0.02),  # at t = 1 it still has some of the data
    ],
)
def test_the_likelihood_of_gaussian_data_is_the_closed_form(objective: ContinuousObjective, tolerance: float) -> None:
    x_0 = MEAN + STD * torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    bits = ode_bits_per_dimension(perfect(objective), objective, x_0, {}, lambda i: signs(i, x_0.shape), 400)
    torch.testing.assert_close(bits, of_gaussian(x_0), rtol=0, atol=tolerance)


def test_its_error_is_of_order_two_in_the_steps() -> None:
    x_0 = MEAN + STD * torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (10, 20, 40):
        bits = ode_bits_per_dimension(perfect(Flow()), Flow(), x_0, {}, lambda i: signs(i, x_0.shape), steps)
        errors.append((bits - of_gaussian(x_0)).abs().max().item())
    assert errors[0] / errors[2] > 4**1.7


def test_probes_estimate_the_divergence_of_dimensions_that_depend_on_each_other() -> None:
    """Turn a flow of different deviations, so that its Jacobian is not diagonal: the mean over probes is exact."""
    scales, angle = torch.tensor([0.3, 1.5]), 0.6
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    def network(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time, x = t.view(-1, 1), x_t.flatten(1) @ turn
        slope = (time - (1 - time) * scales**2) / ((1 - time) ** 2 * scales**2 + time**2)
        return ((slope * x) @ turn.T).view_as(x_t)

    x_0 = torch.tensor([[0.5, -0.2]]).view(1, 2, 1, 1).repeat(4000, 1, 1, 1)
    bits = ode_bits_per_dimension(network, Flow(), x_0, {}, lambda i: signs(i, x_0.shape), 100)
    inner = x_0[0].flatten() @ turn
    log_density = (-0.5 * (inner / scales) ** 2 - torch.log(scales) - 0.5 * math.log(2 * math.pi)).mean()
    assert bits.std() > 0.01
    assert bits.mean().item() == pytest.approx(
        -log_density.item() / math.log(2) - BIN, abs=4 * bits.std().item() / 4000**0.5
    )


def test_bits_per_dimension_of_a_flow_are_recorded_and_do_not_depend_on_the_batch(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = ["diffusion=flow", "diffusion/sampler=euler", "model/size=digits_s", "model.patch_size=4", "runtime=cpu"]
    words += ["train/logger=none", f"data.shards={digits}", "batch_size=16", "total_steps=2", "sample_every=null"]
    in_process("train", *words, "evaluate_every=null", "run_dir=run", "checkpoint_every=2", "precision=fp32")
    how = ["checkpoint=run", "runtime=cpu", "metrics=[nll]", f"data.shards={digits}", "diffusion/sampler=euler"]
    how += ["evaluation.num_images=5", "evaluation.likelihood_steps=8"]
    in_process("evaluate", *how)
    in_process("evaluate", *how, "evaluation.batch_size=2")
    one, two = json_lines(tmp_path / "run/evaluations.jsonl")
    assert one["bits_per_dimension"] == pytest.approx(two["bits_per_dimension"], rel=1e-5)
    assert (one["likelihood_by"], one["likelihood_steps"], one["likelihood_images"]) == ("ode", 8, 5)
