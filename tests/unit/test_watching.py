"""A watched sampler gives the same bits, and each call of the network shows the x_0 that its output implies."""

from collections.abc import Callable

import pytest
import torch
from test_model import golden_model
from test_samplers import CASES, EDM_HALF, LINEAR
from torch import Tensor

from core.batch import Condition
from diffusion.diffusers_samplers import DPMSolverPP, Heun
from diffusion.edm_sampler import EdmHeun
from diffusion.flow import Flow
from diffusion.objective import Objective
from diffusion.ode_samplers import Dopri5, Euler
from diffusion.process import GaussianDiffusion
from diffusion.samplers import DDIM, DDPM, Sampler
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from diffusion.watching import Watched

GAUSSIAN = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
ALL = [*CASES, (Dopri5(), LINEAR), *((sampler, GAUSSIAN) for sampler in (DDPM(6), DDIM(6), DPMSolverPP(6), Heun(6)))]
# Their last call of the network is followed by a step to the x_0 that it implies.
TO_X_0 = [(DDPM(6), GAUSSIAN), (DDIM(6), GAUSSIAN), (DPMSolverPP(6), GAUSSIAN), (Heun(6), GAUSSIAN)]
TO_X_0 += [(Euler(6), LINEAR), (Euler(6), EDM_HALF), (EdmHeun(6), EDM_HALF), (Euler(6), Flow(reversed_time=True))]


@pytest.mark.parametrize("objective", [GAUSSIAN, LINEAR, Flow(reversed_time=True), EDM_HALF])
def test_the_networks_inputs_tell_x_t_and_t(objective: Objective) -> None:
    x_t = torch.randn(3, 4, 2, 2)
    t = torch.tensor([0, 400, 999]) if objective is GAUSSIAN else torch.tensor([0.01, 0.3, 0.99])
    found_x, found_t = objective.from_inputs(*objective.inputs(x_t, t))
    torch.testing.assert_close(found_x, x_t)
    torch.testing.assert_close(found_t, t)


def sampled(
    sampler: Sampler, objective: Objective, watch: Callable[[Callable[[], Tensor]], None] | None
) -> tuple[Tensor, int]:
    """Return a sample of a network with weights that are not zero, and how often the network was called."""
    network, calls = network_of(objective), 0

    def counted(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x_t, t, condition)

    noises = torch.randn(20, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = counted if watch is None else Watched(counted, objective, watch)
    with torch.no_grad():
        return sampler(denoiser, objective, noises.__getitem__, {"label": torch.tensor([0, 1])}), calls


def network_of(objective: Objective) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    model, _ = golden_model()

    def network(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return model(x_t, t, condition)[:, : objective.outputs_per_channel * 4]

    return network


@pytest.mark.parametrize(("sampler", "objective"), ALL)
def test_a_watched_sampler_gives_the_same_bits_and_shows_each_call(sampler: Sampler, objective: Objective) -> None:
    shown = []
    alone, calls = sampled(sampler, objective, None)
    watched, again = sampled(sampler, objective, lambda x_0: shown.append(x_0()))
    assert torch.equal(alone, watched)
    assert len(shown) == calls == again
    assert all(x_0.shape == alone.shape and x_0.isfinite().all() for x_0 in shown)


@pytest.mark.parametrize(("sampler", "objective"), TO_X_0)
def test_the_last_view_of_a_sampler_is_its_sample(sampler: Sampler, objective: Objective) -> None:
    shown = []
    sample, _ = sampled(sampler, objective, lambda x_0: shown.append(x_0()))
    torch.testing.assert_close(shown[-1], sample, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(shown[0], sample, rtol=0.05, atol=0.05)


def test_a_watcher_that_raises_ends_the_sampling_at_once() -> None:
    shown = []

    def leave(x_0: Callable[[], Tensor]) -> None:
        shown.append(x_0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled(DDPM(6), GAUSSIAN, leave)
    assert len(shown) == 1
