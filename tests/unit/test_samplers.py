"""Samplers of continuous objectives converge to the exact solution for Gaussian data, and refuse what does not fit."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_model import tiny
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.continuous import ContinuousObjective
from diffusion.diffusers_samplers import FlowDPMSolverPP
from diffusion.edm import EDM
from diffusion.edm_sampler import EdmHeun
from diffusion.flow import Flow
from diffusion.ode_samplers import Dopri5, Euler, HeunOde, require_readable
from diffusion.paths import GVPPath, VPPath
from diffusion.predictions import PredictNoise, PredictScore
from diffusion.process import GaussianDiffusion
from diffusion.samplers import DDPM, Sampler
from diffusion.schedules import LinearSchedule
from diffusion.sde_samplers import DIFFUSIONS, LAST_STEPS, EulerMaruyama, StochasticHeun
from diffusion.time_grids import even_times, noise_levels, shifted
from diffusion.variances import LearnedRangeVariance

MEAN, STD = 0.4, 0.5
POINTS = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)


def perfect(objective: ContinuousObjective) -> Denoiser:
    """Return the network of least loss for x_0 ~ N(m, s^2).

    E[x_0 | x_t] = m + alpha s^2 (x_t - alpha m) / (alpha^2 s^2 + sigma^2), and the noise is its complement. The
    network's inputs are inverted to t and x_t.
    """

    def network(seen: Tensor, network_t: Tensor, condition: Condition) -> Tensor:
        if isinstance(objective, EDM):
            t = torch.exp(4 * network_t)
            x_t = seen * objective.parameterization.total(objective.coefficients(t))
        else:
            x_t, t = seen, 1 - network_t if isinstance(objective, Flow) and objective.reversed_time else network_t
        c = objective.coefficients(t)
        slope = (x_t - c.alpha * MEAN) / (c.alpha**2 * STD**2 + c.sigma**2)
        x_0, noise = MEAN + c.alpha * STD**2 * slope, c.sigma * slope
        target = objective.parameterization.target(x_0, noise, c)
        target = -noise / c.sigma if objective.parameterization.name == "score" else target
        target = -target if isinstance(objective, Flow) and objective.reversed_time else target
        return torch.cat([target] * objective.outputs_per_channel, dim=1)

    return network


def exact(objective: ContinuousObjective, x: Tensor) -> Tensor:
    """Return the end of the equation without noise that starts at x: quantiles stay the same."""
    low, high = objective.sampling_interval
    low = 0.0 if objective.has_levels else low
    (a, s), (b, r) = ((v.double() for v in objective.alpha_sigma(torch.tensor([t]))) for t in (high, low))
    deviation = torch.sqrt(b**2 * STD**2 + r**2) / torch.sqrt(a**2 * STD**2 + s**2)
    return b * MEAN + deviation * (x.double() - a * MEAN)


def orders(errors: list[float]) -> float:
    """Return the mean order from errors, of which each has twice the steps of the one before."""
    return float(np.log2(errors[0] / errors[-1]) / (len(errors) - 1))


LINEAR, GVP, VP = Flow(), Flow(GVPPath()), Flow(VPPath())
SIT = Flow(reversed_time=True, outputs_per_channel=2)


@pytest.mark.parametrize(
    ("sampler", "objective", "order"),
    [
        (Euler, LINEAR, 1),
        (Euler, GVP, 1),
        (Euler, SIT, 1),
        (Euler, EDM(sigma_data=STD), 1),
        (partial(Euler, shift=3.0), LINEAR, 1),
        (HeunOde, LINEAR, 2),
        (HeunOde, GVP, 2),
        (HeunOde, SIT, 2),
        (partial(HeunOde, shift=3.0), LINEAR, 2),
        (partial(HeunOde, shift=0.5), GVP, 2),
        (HeunOde, Flow(GVPPath(), PredictNoise()), 2),
        (EdmHeun, EDM(sigma_data=STD), 2),
        (EdmHeun, EDM(sigma_data=1.0), 2),
    ],
)
def test_a_deterministic_sampler_converges_to_the_exact_solution_with_its_order(
    sampler: Callable[..., Sampler], objective: ContinuousObjective, order: int
) -> None:
    start = objective.sampling_interval[1] if objective.has_levels else 1.0
    errors = []
    for steps in (10, 20, 40):
        one = sampler(steps)
        one.require(objective)
        found = one(perfect(objective), objective, lambda _: POINTS, {})
        errors.append((found - exact(objective, start * POINTS)).abs().max().item())
    assert errors[-1] < (0.1 if order == 1 else 0.01)
    assert orders(errors) > order - 0.25


def test_heuns_errors_are_those_of_its_closed_form() -> None:
    """Check the measured values of a straight line: 1.9e-4, 5.0e-5, 1.3e-5 at 50, 100, 200 steps in float64."""
    errors = [
        (HeunOde(steps)(perfect(LINEAR), LINEAR, lambda _: POINTS, {}) - exact(LINEAR, POINTS)).abs().max().item()
        for steps in (25, 50, 100)
    ]
    assert orders(errors) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("objective", [LINEAR, GVP, SIT, VP, Flow(VPPath(), PredictScore())])
def test_dopri5_reaches_its_tolerance_and_counts_its_calls(objective: Flow) -> None:
    calls = 0
    known = perfect(objective)

    def counted(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        nonlocal calls
        calls += 1
        return known(x_t, t, condition)

    errors = []
    for rtol in (1e-2, 1e-5):
        sampler, calls = Dopri5(atol=rtol / 10, rtol=rtol), 0
        assert sampler.calls() is None
        sampler.require(objective)
        found = sampler(counted, objective, lambda _: POINTS, {})
        assert sampler.calls() == calls
        errors.append((found - exact(objective, POINTS)).abs().max().item())
    assert errors[1] < min(1e-3, errors[0])


def test_the_line_and_the_quarter_circle_have_one_equation_up_to_time() -> None:
    """Solve both finely: the same noise becomes the same sample."""
    samples = [HeunOde(200)(perfect(flow), flow, lambda _: POINTS, {}) for flow in (LINEAR, GVP, SIT)]
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(samples[0], samples[2], rtol=0, atol=1e-5)


def test_edms_method_without_churn_is_heuns_in_the_noise_level() -> None:
    edm = EDM(sigma_data=STD)
    network = perfect(edm)

    def slope(x: Tensor, level: float) -> Tensor:
        t = torch.full((len(x),), level)
        return (x - edm.prediction(network(*edm.inputs(x, t), {}), x, t).x_0) / level

    levels = noise_levels(0.002, 80.0, 18)
    x = 80 * POINTS
    for level, next_level in pairwise(levels):
        first = slope(x, level)
        tried = x + (next_level - level) * first
        x = tried if next_level == 0 else x + (next_level - level) * (first + slope(tried, next_level)) / 2
    torch.testing.assert_close(EdmHeun(18)(network, edm, lambda _: POINTS, {}), x, rtol=1e-5, atol=1e-5)


def responses(sampler: Sampler, objective: ContinuousObjective, steps: int) -> tuple[float, float]:
    """Return mean and standard deviation of the samples for Gaussian data, exactly.

    Sampling is affine in all its noise: row i of a batch has 1 at draw i and 0 at the others, and the last row has only
    zeros, so differences from the last row are the factors of the draws.
    """

    def noise(draw: int) -> Tensor:
        rows = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
        rows[draw] = 1
        return rows

    found = sampler(perfect(objective), objective, noise, {}).flatten()
    return found[-1].item(), (found[:-1] - found[-1]).square().sum().sqrt().item()


@pytest.mark.parametrize("form", sorted(DIFFUSIONS))
@pytest.mark.parametrize("objective", [LINEAR, GVP, SIT])
@pytest.mark.parametrize("kind", [EulerMaruyama, StochasticHeun])
def test_a_stochastic_sampler_converges_to_mean_and_deviation_of_the_data(
    kind: type[EulerMaruyama] | type[StochasticHeun], objective: Flow, form: str
) -> None:
    if form == "sbdm":
        objective = Flow(objective.path, PredictNoise())
    errors = []
    for steps in (50, 100, 200):
        sampler = kind(steps, form, last_step="euler", last_size=1.0 / steps + objective.sampling_interval[0])  # type: ignore[arg-type]
        sampler.require(objective)
        mean, std = responses(sampler, objective, steps)
        errors.append(abs(mean - MEAN) + abs(std - STD))
    assert errors[-1] < 0.01
    assert errors[-1] < 5e-4 or orders(errors) > 0.75


@pytest.mark.parametrize("last_step", sorted(LAST_STEPS))
@pytest.mark.parametrize("kind", [EulerMaruyama, StochasticHeun])
def test_each_last_step_ends_near_the_data(kind: type[EulerMaruyama] | type[StochasticHeun], last_step: str) -> None:
    mean, std = responses(kind(200, last_step=last_step, last_size=0.01), LINEAR, 200)  # type: ignore[arg-type]
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert std == pytest.approx(STD, abs=0.01)


def test_churn_keeps_mean_and_deviation_and_makes_samples_random() -> None:
    edm = EDM(sigma_data=STD)
    sampler = EdmHeun(200, churn=40.0, churn_min=0.05, churn_max=50.0)
    mean, std = responses(sampler, edm, 200)
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert std == pytest.approx(STD, abs=0.01)
    drawn = [sampler(perfect(edm), edm, lambda draw, k=k: POINTS if draw == 0 else k + 0 * POINTS, {}) for k in (0, 1)]
    assert not torch.allclose(*drawn)


def test_diffusion_coefficients_follow_their_formulas() -> None:
    t = torch.tensor([0.3])
    c = LINEAR.coefficients(t)
    found = {form: DIFFUSIONS[form](c, 0.3, 1.0).item() for form in DIFFUSIONS}
    assert found == {
        "constant": 1.0,
        "sbdm": pytest.approx(0.3 / 0.7),
        "sigma": pytest.approx(0.3),
        "linear": pytest.approx(0.3),
        "decreasing": pytest.approx(0.25 * (math.cos(math.pi * 0.7) + 1) ** 2),
        "increasing_decreasing": pytest.approx(math.sin(math.pi * 0.7) ** 2),
    }
    vp = Flow(VPPath(), PredictNoise())
    assert DIFFUSIONS["sbdm"](vp.coefficients(t), 0.3, 1.0).item() == pytest.approx((0.1 + 0.3 * 19.9) / 2, rel=1e-4)


def test_grids_have_their_ends_and_a_shift_moves_times_toward_the_noise() -> None:
    assert even_times((1.0, 0.0), 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    moved = even_times((0.999, 0.001), 4, shift=3.0)
    assert (moved[0], moved[-1]) == (0.999, 0.001)
    assert all(a > b for a, b in zip(moved[1:-1], even_times((0.999, 0.001), 4)[1:-1], strict=True))
    lightningdit = 0.3 * 0.4 / (1 - 0.7 * 0.4)  # of its own time, from noise to data
    assert 1 - shifted(1 - 0.4, 1 / 0.3) == pytest.approx(lightningdit)
    levels = noise_levels(0.002, 80.0, 3)
    assert levels == pytest.approx([80.0, ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, 0.002, 0.0])


EDM_HALF = EDM(sigma_data=0.5)
CASES = [
    (Euler(6), LINEAR),
    (Euler(6), EDM_HALF),
    (HeunOde(6), GVP),
    (EulerMaruyama(6), SIT),
    (EulerMaruyama(6, last_step="none"), LINEAR),
    (StochasticHeun(6), LINEAR),
    (StochasticHeun(6, last_step="none"), Flow(prediction=PredictNoise())),
    (EdmHeun(6), EDM_HALF),
    (EdmHeun(6, churn=10.0), EDM_HALF),
    (FlowDPMSolverPP(6), LINEAR),
]


@pytest.mark.parametrize(("sampler", "objective"), CASES)
def test_a_sampler_says_how_often_it_calls_the_network(sampler: Sampler, objective: ContinuousObjective) -> None:
    calls, known = 0, perfect(objective)

    def counted(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        nonlocal calls
        calls += 1
        return known(x_t, t, condition)

    sampler.require(objective)
    assert sampler(counted, objective, lambda _: torch.randn(2, 1, 4, 4), {}).isfinite().all()
    assert calls == sampler.calls()


@pytest.mark.parametrize(("sampler", "objective"), CASES)
def test_a_sampler_of_fixed_steps_reads_nothing_back_from_the_device(
    sampler: Sampler, objective: ContinuousObjective
) -> None:
    """Sample on the meta device, where reading a value raises."""
    model = tiny(outputs_per_channel=objective.outputs_per_channel).to("meta")
    condition = {"label": torch.zeros(2, dtype=torch.int64, device="meta")}
    assert not sampler.reads_device
    sample = sampler(model, objective, lambda _: torch.empty(2, 4, 8, 8, device="meta"), condition)
    assert sample.shape == (2, 4, 8, 8)
    assert sample.is_meta


@pytest.mark.parametrize("sampler", [EulerMaruyama(6), StochasticHeun(6), EdmHeun(6, churn=10.0)])
def test_an_image_does_not_depend_on_those_that_it_is_sampled_with(sampler: Sampler) -> None:
    objective = EDM_HALF if isinstance(sampler, EdmHeun) else LINEAR
    noises = torch.randn(8, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    together = sampler(perfect(objective), objective, noises.__getitem__, {})
    alone = sampler(perfect(objective), objective, lambda draw: noises[draw, 3:4], {})
    torch.testing.assert_close(together[3:4], alone)


GAUSSIAN = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())


@pytest.mark.parametrize(
    ("sampler", "objective", "words"),
    [
        (Euler(), GAUSSIAN, "sampler euler needs an objective with a velocity, .* diffusion=gaussian; use .*=ddpm"),
        (HeunOde(), GAUSSIAN, "sampler heun_ode needs .* diffusion=gaussian; use diffusion/sampler=ddpm"),
        (HeunOde(), EDM_HALF, "sampler heun_ode needs .* diffusion=edm, .* use diffusion/sampler=edm_heun"),
        (Dopri5(), GAUSSIAN, "sampler dopri5 needs .* diffusion=gaussian; use diffusion/sampler=ddpm"),
        (Dopri5(), EDM_HALF, "sampler dopri5 needs .* diffusion=edm, .* use diffusion/sampler=edm_heun"),
        (EulerMaruyama(), GAUSSIAN, "sampler euler_maruyama needs .* diffusion=gaussian; use diffusion/sampler=ddpm"),
        (StochasticHeun(), EDM_HALF, "sampler stochastic_heun needs .* diffusion=edm, .* use .*=edm_heun"),
        (EdmHeun(), LINEAR, "sampler edm_heun needs .* diffusion=edm, .* is diffusion=flow; use .*=heun_ode"),
        (EdmHeun(), GAUSSIAN, "sampler edm_heun needs .* diffusion=edm, .* is diffusion=gaussian; use .*=ddpm"),
        (DDPM(), LINEAR, "sampler ddpm needs diffusion=gaussian, but .* diffusion=flow; use .*=heun_ode"),
        (DDPM(), EDM_HALF, "sampler ddpm needs diffusion=gaussian, but .* diffusion=edm; use .*=edm_heun"),
        (FlowDPMSolverPP(), GVP, "needs diffusion=flow diffusion/path=linear, .* diffusion/path=gvp; use .*=heun_ode"),
        (FlowDPMSolverPP(), EDM_HALF, "needs diffusion=flow diffusion/path=linear, .* diffusion=edm; use .*=edm_heun"),
        (FlowDPMSolverPP(), GAUSSIAN, "needs diffusion=flow .* diffusion=gaussian; use .*=dpm_solver_pp"),
        (Euler(shift=3.0), EDM_HALF, r"sampler.shift is 3.0, but diffusion=edm has noise levels"),
        (Euler(shift=0.0), LINEAR, r"sampler.shift is 0.0, but it must be above 0"),
        (
            EulerMaruyama(diffusion="sbdm"),
            LINEAR,
            "sbdm is infinite at t = 1, pure noise, .* prediction velocity",
        ),
        (EulerMaruyama(diffusion="sbdm"), GVP, "sbdm is infinite at t = 1, pure noise, .* prediction velocity"),
        (EulerMaruyama(last_size=0.0), LINEAR, r"last_size is 0.0, but it must be between 0 and 1"),
        (EulerMaruyama(last_size=1e-4), Flow(prediction=PredictNoise()), r"must be between 0.001 and 0.999"),
        (StochasticHeun(last_step="none"), LINEAR, "last_step=none makes stochastic_heun evaluate the score at t = 0"),
    ],
)
def test_a_sampler_and_an_objective_that_do_not_fit_are_both_named(
    sampler: Sampler, objective: ContinuousObjective, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        sampler.require(objective)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Euler(0), r"sampler.steps is 0, but euler needs at least 1 step"),
        (lambda: EulerMaruyama(1), r"sampler.steps is 1, but euler_maruyama needs at least 2 steps"),
        (lambda: EulerMaruyama(diffusion="SBDM"), r"sampler.diffusion is 'SBDM', but .* constant, sbdm, sigma"),  # type: ignore[arg-type]
        (lambda: EulerMaruyama(last_step="last"), r"sampler.last_step is 'last', but .* mean, tweedie, euler, none"),  # type: ignore[arg-type]
        (lambda: StochasticHeun(norm=-1.0), r"sampler.norm is -1.0"),
        (lambda: EdmHeun(1), r"sampler.steps is 1, but edm_heun needs at least 2 steps"),
        (lambda: EdmHeun(churn=-1.0), r"sampler.churn is -1.0"),
        (lambda: EdmHeun(churn_min=2.0, churn_max=1.0), r"churn_max 1.0 is below sampler.churn_min 2.0"),
        (lambda: EdmHeun(rho=0.0), r"sampler.rho is 0.0"),
        (lambda: Dopri5(rtol=0.0), r"sampler.rtol is 0.0, but a tolerance is between 0 and 1"),
        (lambda: FlowDPMSolverPP(order=4), r"sampler.order is 4"),
        (lambda: FlowDPMSolverPP(1), r"sampler.steps is 1, but flow_dpm_solver_pp needs at least 2 steps"),
    ],
)
def test_settings_that_a_sampler_does_not_have_are_refused(make: Callable[[], Sampler], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_sbdm_samples_where_the_start_is_not_pure_noise() -> None:
    for objective in (Flow(prediction=PredictNoise()), Flow(GVPPath(), PredictScore()), VP):
        sampler = EulerMaruyama(20, "sbdm")
        sampler.require(objective)
        assert sampler(perfect(objective), objective, lambda _: POINTS, {}).isfinite().all()


def test_a_sampler_that_reads_from_the_device_is_refused_under_xla() -> None:
    with pytest.raises(ValueError, match=r"sampler dopri5 chooses its steps .* runtime=xla .* use .*=heun_ode"):
        require_readable(Dopri5(), torch.device("xla"))
    require_readable(HeunOde(), torch.device("xla"))
    require_readable(Dopri5(), torch.device("cpu"))
