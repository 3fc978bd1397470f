"""diffusers' solvers converge on the line of a flow, and sample from each prediction that they know."""

import numpy as np
import pytest
import torch
from test_samplers import LINEAR, MEAN, POINTS, STD, exact, orders, perfect
from torch import Tensor

from core.batch import Condition
from diffusion.diffusers_samplers import DPMSolverPP, FlowDPMSolverPP, Heun
from diffusion.flow import Flow
from diffusion.predictions import PredictNoise, PredictScore, PredictV, PredictX0
from diffusion.process import GaussianDiffusion
from diffusion.samplers import Sampler
from diffusion.schedules import LinearSchedule
from diffusion.variances import FixedSmallVariance


@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers_solver_converges_on_the_line(order: int) -> None:
    errors = []
    for steps in (40, 80, 160, 320):
        found = FlowDPMSolverPP(steps, order)(perfect(LINEAR), LINEAR, lambda _: POINTS, {})
        at_start = Flow()
        at_start.sampling_interval = (0.0, 0.999)
        errors.append((found - exact(at_start, POINTS)).abs().max().item())
    assert errors[-1] < 0.02
    assert orders(errors) > min(order, 2) - 0.3  # its last step is of order one


@pytest.mark.parametrize("prediction", [PredictNoise(), PredictV(), PredictX0(), PredictScore()])
@pytest.mark.parametrize("sampler", [DPMSolverPP(20), Heun(20)])
def test_diffusers_solvers_sample_from_each_prediction_that_they_know(
    sampler: Sampler, prediction: PredictNoise
) -> None:
    process = GaussianDiffusion(LinearSchedule(), FixedSmallVariance(), prediction=prediction)
    if prediction.name not in type(sampler).predictions:  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=f"{sampler.name} .* objective has diffusion/prediction={prediction.name}"):
            sampler.require(process)
        return
    sampler.require(process)
    alphas = process.tables.alphas_cumprod

    def network(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        sigmas = np.interp(t.numpy(), np.arange(1000), np.sqrt((1 - alphas) / alphas))
        level = torch.from_numpy(sigmas).float().view(-1, 1, 1, 1)
        alpha, sigma = 1 / torch.sqrt(1 + level**2), level / torch.sqrt(1 + level**2)
        slope = (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x_0, noise = MEAN + alpha * STD**2 * slope, sigma * slope
        return {"noise": noise, "x_0": x_0, "v": alpha * noise - sigma * x_0}[prediction.name]

    torch.testing.assert_close(sampler(network, process, lambda _: POINTS, {}), MEAN + STD * POINTS, rtol=0, atol=0.05)
