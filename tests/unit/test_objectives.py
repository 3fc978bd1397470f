"""Objectives equal the released SiT program and closed forms, whatever quantity the network predicts."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sit import PATHS, sit_flow, sit_golden, sit_network
from torch import Tensor

from core.batch import Batch
from diffusion.continuous import ContinuousObjective
from diffusion.diffusers_samplers import DPMSolverPP, Heun
from diffusion.edm import EDM
from diffusion.flow import Flow
from diffusion.objective import LatentFacts, Objective, corrupt
from diffusion.paths import Coefficients, GVPPath, LinearPath, Path, VPPath
from diffusion.predictions import Parameterization, PredictNoise, PredictScore, PredictV, PredictVelocity, PredictX0
from diffusion.process import GaussianDiffusion
from diffusion.samplers import DDIM, DDPM, Sampler
from diffusion.schedules import LinearSchedule
from diffusion.times import LogitNormalTimes, LogNormalLevels, UniformTimes
from diffusion.variances import FixedSmallVariance, LearnedRangeVariance
from diffusion.weightings import MinSNR, OfLikelihood, OfVelocity, Unweighted, Weighting

MEAN, STD = 0.4, 0.5
OF_ANY: list[Parameterization] = [PredictNoise(), PredictX0(), PredictV(), PredictScore()]
OF_FLOW = [*OF_ANY, PredictVelocity()]
name_of: Callable[[Any], str | None] = lambda value: getattr(value, "name", None)  # noqa: E731


def gaussian(prediction: Parameterization, weighting: Weighting | None = None) -> GaussianDiffusion:
    return GaussianDiffusion(
        LinearSchedule(), FixedSmallVariance(), prediction=prediction, weighting=weighting or Unweighted()
    )


LOSSES = sorted(name.removesuffix("/ut") for name in sit_golden() if name.endswith("/ut"))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", LOSSES)
def test_losses_equal_the_released_sit_program(case: str) -> None:
    golden, (_, path, prediction, weighting) = sit_golden(), case.split("/")
    flow, t = sit_flow(path, prediction, weighting), 1 - golden[f"{case}/t"]
    batch = Batch(golden["loss/x1"], golden["loss/x0"], t, {"label": golden["loss/y"]})
    x_t = corrupt(flow, batch)
    torch.testing.assert_close(x_t, golden[f"{case}/xt"], rtol=1e-5, atol=1e-5)
    velocity = PredictVelocity().target(batch.x_0, batch.noise, flow.coefficients(t))
    torch.testing.assert_close(-velocity, golden[f"{case}/ut"], rtol=1e-5, atol=1e-5)
    losses = flow.losses(sit_network()(*flow.inputs(x_t, t), batch.condition), batch, x_t)
    torch.testing.assert_close(losses["loss"], golden[f"{case}/loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", LOSSES)
def test_times_are_mapped_to_the_interval_of_the_released_sit_program(case: str) -> None:
    low, high = sit_flow(*case.split("/")[1:]).training_interval
    mapped = high - (high - low) * sit_golden()["loss/u"]
    torch.testing.assert_close(1 - mapped, sit_golden()[f"{case}/t"], rtol=0, atol=1e-6)


def test_all_of_sits_losses_are_among_the_cases() -> None:
    assert len(LOSSES) == 21


def test_the_straight_flow_has_the_bits_of_earlier_versions() -> None:
    flow, (x_0, noise, output) = Flow(), torch.randn(3, 8, 4, 6, 6)
    t = torch.rand(8)
    wide = t.view(-1, 1, 1, 1)
    x_t = corrupt(flow, Batch(x_0, noise, t, {}))
    assert torch.equal(x_t, (1 - wide) * x_0 + wide * noise)
    losses = flow.losses(output, Batch(x_0, noise, t, {}), x_t)
    assert losses.keys() == {"loss"}
    assert torch.equal(losses["loss"], ((noise - x_0 - output.float()) ** 2).flatten(1).mean(dim=1))
    found = flow.prediction(output, x_t, t)
    assert torch.equal(found.x_0, x_t - wide * output)
    assert torch.equal(found.noise, x_t + (1 - wide) * output)
    assert torch.equal(flow.velocity(output, x_t, t), output)
    assert isinstance(flow.times, UniformTimes)
    assert flow.training_interval == flow.sampling_interval == (0, 1)


def test_the_papers_loss_has_the_bits_of_earlier_versions() -> None:
    process = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
    x_0, noise = torch.randn(2, 8, 4, 6, 6)
    output, t = torch.randn(8, 8, 6, 6), torch.arange(0, 1000, 125)
    batch = Batch(x_0, noise, t, {})
    x_t = corrupt(process, batch)
    losses = process.losses(output, batch, x_t)
    mse = ((noise - output[:, :4]) ** 2).flatten(1).mean(dim=1)
    assert torch.equal(losses["mse"], mse)
    assert torch.equal(losses["loss"], mse + losses["vlb"])
    recip, recipm1 = process.table("sqrt_recip_alphas_cumprod", t), process.table("sqrt_recipm1_alphas_cumprod", t)
    assert torch.equal(process.prediction(output, x_t, t).x_0, recip * x_t - recipm1 * output[:, :4])


@pytest.mark.parametrize("path", PATHS.values(), ids=name_of)
def test_the_rates_of_a_path_are_its_derivatives(path: Path) -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    for function, rate in ((path.alpha, path.alpha_rate), (path.sigma, path.sigma_rate)):
        (expected,) = torch.autograd.grad(function(t).sum(), t)
        torch.testing.assert_close(rate(t), expected)
    turn = path.alpha(t) * path.sigma_rate(t) - path.alpha_rate(t) * path.sigma(t)
    torch.testing.assert_close(path.turn(t), turn)
    assert (turn > 0).all()


@pytest.mark.parametrize("path", PATHS.values(), ids=name_of)
def test_a_path_leads_from_data_to_noise(path: Path) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    assert (alpha[0], sigma[0]) == (1, 0)
    assert alpha[-1] == pytest.approx(0, abs=1e-2)
    assert sigma[-1] == pytest.approx(1, abs=1e-4)
    assert (alpha.diff() < 0).all()
    assert path.reaches_noise == (alpha[-1].abs() < 1e-6)


def continuous_objectives() -> list[ContinuousObjective]:
    flows = [Flow(path, prediction) for path in PATHS.values() for prediction in OF_FLOW]
    return [*flows, EDM(STD), EDM(0.9)]


def name_with_parts(objective: Objective) -> str:
    return "-".join(str(value) for value in objective.facts().values() if isinstance(value, str))


def times_of(objective: ContinuousObjective, count: int = 200) -> Tensor:
    return torch.linspace(0.05, 20, count) if objective.has_levels else torch.linspace(0.05, 0.95, count)


def conditional_means(c: Coefficients, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[x_0 | x_t] and E[noise | x_t] for x_0 ~ N(MEAN, STD^2)."""
    centered = (x_t - c.alpha * MEAN) / ((c.alpha * STD) ** 2 + c.sigma**2)
    return MEAN + c.alpha * STD**2 * centered, c.sigma * centered


def output_of(prediction: Parameterization, x_0: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
    """Return the output of a network that means these."""
    mixed = prediction.target(x_0, noise, c)
    return -mixed / c.sigma if isinstance(prediction, PredictScore) else mixed


@pytest.mark.parametrize("objective", continuous_objectives(), ids=name_with_parts)
def test_the_best_network_for_gaussian_data_gives_the_exact_velocity_and_score(objective: ContinuousObjective) -> None:
    t = times_of(objective)
    c = objective.coefficients(t)
    x_t = torch.randn(len(t), 1, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.hypot(c.alpha, c.sigma)
    output = output_of(objective.parameterization, *conditional_means(c, x_t), c)
    assert c.alpha_rate is not None
    assert c.sigma_rate is not None
    variance = (c.alpha * STD) ** 2 + c.sigma**2
    slope = (c.alpha * c.alpha_rate * STD**2 + c.sigma * c.sigma_rate) / variance
    exact = c.alpha_rate * MEAN + slope * (x_t - c.alpha * MEAN)
    torch.testing.assert_close(objective.velocity(output, x_t, t), exact, rtol=1e-4, atol=1e-4)
    score = -(x_t - c.alpha * MEAN) / variance
    torch.testing.assert_close(objective.score(output, x_t, t), score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", continuous_objectives(), ids=name_with_parts)
def test_the_best_network_has_the_least_loss(objective: ContinuousObjective) -> None:
    generator = torch.Generator().manual_seed(0)
    t = times_of(objective, 2000)
    x_0 = MEAN + STD * torch.randn(len(t), 1, 4, 4, generator=generator)
    batch = Batch(x_0, torch.randn(x_0.shape, generator=generator), t, {})
    c, x_t = objective.coefficients(t), corrupt(objective, batch)
    output = output_of(objective.parameterization, *conditional_means(c, x_t), c)
    best = objective.losses(output, batch, x_t)["loss"].mean()
    for other in (output + 0.1, output - 0.1, 0.9 * output, 1.1 * output):
        assert best < objective.losses(other, batch, x_t)["loss"].mean()


@pytest.mark.parametrize("prediction", OF_ANY, ids=name_of)
def test_a_gaussian_process_reads_the_same_ends_from_each_prediction(prediction: Parameterization) -> None:
    process, t = gaussian(prediction), torch.tensor([0, 10, 400, 700])
    x_0, noise = torch.randn(2, 4, 2, 4, 4)
    x_t = corrupt(process, Batch(x_0, noise, t, {}))
    found = process.prediction(output_of(prediction, x_0, noise, process.coefficients(t)), x_t, t)
    torch.testing.assert_close(found.x_0, x_0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.noise, noise, rtol=1e-3, atol=1e-3)
    losses = process.losses(output_of(prediction, x_0, noise, process.coefficients(t)), Batch(x_0, noise, t, {}), x_t)
    assert losses["loss"].max() < 1e-10


@pytest.mark.parametrize("prediction", OF_ANY, ids=name_of)
def test_the_bound_vanishes_for_the_exact_posterior_whatever_is_predicted(prediction: Parameterization) -> None:
    process = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance(), prediction=prediction)
    t, (x_0, noise) = torch.tensor([1, 10, 400, 999]), torch.randn(2, 4, 1, 4, 4)
    x_t = corrupt(process, Batch(x_0, noise, t, {}))
    exact = output_of(prediction, x_0, noise, process.coefficients(t))
    losses = process.losses(torch.cat([exact, -torch.ones_like(exact)], dim=1), Batch(x_0, noise, t, {}), x_t)
    assert losses["vlb"].abs().max() < 1e-3
    assert losses["mse"].max() < 1e-8


def ids_of(value: Any) -> str | None:
    return type(value).__name__ if isinstance(value, Sampler) else name_of(value)


@pytest.mark.parametrize(
    ("sampler", "prediction"),
    [
        *((sampler, prediction) for sampler in (DDPM(steps=1000), DDIM(steps=250)) for prediction in OF_ANY),
        *((DPMSolverPP(30), prediction) for prediction in OF_ANY[:3]),
        *((Heun(30), prediction) for prediction in (PredictNoise(), PredictV())),
    ],
)
def test_samplers_give_a_gaussian_its_mean_and_variance_from_each_prediction(
    sampler: Sampler, prediction: Parameterization
) -> None:
    process, generator = gaussian(prediction), torch.Generator().manual_seed(0)
    alphas = process.tables.alphas_cumprod

    def network(x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        found = torch.from_numpy(np.interp(t.numpy(), np.arange(1000), np.sqrt((1 - alphas) / alphas))).float()
        sigma_by_alpha = found.view(-1, 1, 1, 1)
        alpha = 1 / torch.sqrt(1 + sigma_by_alpha**2)
        c = Coefficients(alpha, alpha * sigma_by_alpha, 1 / alpha, sigma_by_alpha)
        return output_of(prediction, *conditional_means(c, x_t), c)

    sampler.require(process)
    sample = sampler(network, process, lambda _: torch.randn(4000, 1, 1, 1, generator=generator), {})
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert sample.std().item() == pytest.approx(STD, rel=0.06)


WEIGHTINGS: list[Weighting] = [MinSNR(5.0), MinSNR(0.3), OfVelocity(), OfLikelihood()]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
@pytest.mark.parametrize("path", PATHS.values(), ids=name_of)
def test_a_weighting_gives_one_loss_for_one_prediction_on_a_path(path: Path, weighting: Weighting) -> None:
    t = torch.linspace(0.1, 0.9, 9)
    (x_0, noise), guess = torch.randn(2, 9, 2, 4, 4), torch.randn(9, 2, 4, 4)
    c = path.at(t)
    x_t = c.alpha * x_0 + c.sigma * noise
    found = []
    for prediction in OF_FLOW:
        output = output_of(prediction, guess, (x_t - c.alpha * guess) / c.sigma, c)
        found.append(Flow(path, prediction, weighting).losses(output, Batch(x_0, noise, t, {}), x_t)["loss"])
    for loss in found[1:]:
        torch.testing.assert_close(loss, found[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("gamma", [5.0, 0.7])
def test_the_three_forms_of_min_snr_give_one_loss_for_one_prediction(gamma: float) -> None:
    t, (x_0, noise, guess) = torch.arange(50, 1000, 100), torch.randn(3, 10, 2, 4, 4)
    found = {}
    for prediction in OF_ANY:
        process = gaussian(prediction, MinSNR(gamma))
        c, batch = process.coefficients(t), Batch(x_0, noise, t, {})
        x_t = corrupt(process, batch)
        output = output_of(prediction, guess, (x_t - c.alpha * guess) / c.sigma, c)
        found[prediction.name] = process.losses(output, batch, x_t)["loss"]
        plain = gaussian(prediction).losses(output, batch, x_t)["loss"]
        snr = (c.alpha / c.sigma).flatten() ** 2
        least = snr.clamp(max=gamma)
        forms = {"x_0": least, "noise": least / snr, "v": least / (snr + 1), "score": least / snr}
        torch.testing.assert_close(found[prediction.name], forms[prediction.name] * plain, rtol=1e-4, atol=0)
    for loss in found.values():
        torch.testing.assert_close(loss, found["x_0"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("one", OF_FLOW, ids=name_of)
@pytest.mark.parametrize("other", OF_FLOW, ids=name_of)
@pytest.mark.parametrize("path", PATHS.values(), ids=name_of)
def test_every_prediction_converts_into_every_other(path: Path, one: Parameterization, other: Parameterization) -> None:
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    output, x_t = torch.randn(2, 9, 1, 3, 3, dtype=torch.float64)
    c = path.at(t)
    converted = output_of(other, *one.ends(output, x_t, c), c)
    torch.testing.assert_close(output_of(one, *other.ends(converted, x_t, c), c), output)
    torch.testing.assert_close(other.velocity(converted, x_t, c), one.velocity(output, x_t, c))


def test_the_linear_path_has_the_same_ode_as_gvp_up_to_time_and_scale() -> None:
    """Check that k(u) x(t(u)) follows GVP's velocity where x follows the linear one and x_0 / noise are the same."""
    linear, gvp, u = LinearPath(), GVPPath(), torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    ratio = gvp.sigma(u) / gvp.alpha(u)
    t = ratio / (1 + ratio)  # the linear time of the same SNR
    k = gvp.alpha(u) / linear.alpha(t)
    (t_rate,) = torch.autograd.grad(t.sum(), u, retain_graph=True)
    (k_rate,) = torch.autograd.grad(k.sum(), u)
    x_t, velocity = torch.randn(2, 19, dtype=torch.float64)
    ends = PredictVelocity().ends(velocity.view(-1, 1, 1, 1), x_t.view(-1, 1, 1, 1), linear.at(t.detach()))
    c = gvp.at(u.detach())
    of_gvp = PredictVelocity().target(*ends, c).flatten()
    torch.testing.assert_close(of_gvp, (k_rate * x_t + k * t_rate * velocity).detach())


def test_edms_published_weight_times_the_square_of_c_out_is_one() -> None:
    """Compare with equation 8: lambda |D - x_0|^2, D = c_skip x + c_out F(c_in x; c_noise), as in table 1."""
    edm, sigma = EDM(0.7), torch.tensor([0.002, 0.1, 0.7, 3.0, 80.0])
    x_0, noise, output = torch.randn(3, 5, 2, 4, 4)
    wide, batch = sigma.view(-1, 1, 1, 1), Batch(x_0, noise, sigma, {})
    x = corrupt(edm, batch)
    total = torch.sqrt(wide**2 + 0.7**2)
    c_skip, c_out, weight = 0.7**2 / total**2, wide * 0.7 / total, total**2 / (wide * 0.7) ** 2
    torch.testing.assert_close(weight * c_out**2, torch.ones_like(wide))
    denoised = c_skip * x + c_out * output
    torch.testing.assert_close(edm.prediction(output, x, sigma).x_0, denoised, rtol=1e-4, atol=1e-4)
    seen, c_noise = edm.inputs(x, sigma)
    torch.testing.assert_close(seen, x / total)
    torch.testing.assert_close(c_noise, torch.log(sigma) / 4)
    c = edm.coefficients(sigma)
    torch.testing.assert_close(edm.parameterization.c_skip(c), c_skip)
    torch.testing.assert_close(edm.parameterization.c_out(c), c_out)
    loss = (weight * (denoised - x_0) ** 2).flatten(1).mean(1)[1:4]  # at the others D - x_0 is rounded away
    torch.testing.assert_close(edm.losses(output, batch, x)["loss"][1:4], loss, rtol=1e-3, atol=0)


def test_edms_target_and_input_have_unit_variance_at_every_noise_level() -> None:
    edm, sigma = EDM(STD), torch.logspace(-2, 2, 9).repeat_interleave(4000)
    x_0, noise = torch.randn(2, len(sigma), 1, 1, 1, generator=torch.Generator().manual_seed(0))
    batch = Batch(STD * x_0, noise, sigma, {})
    target = edm.parameterization.target(batch.x_0, noise, edm.coefficients(sigma))
    for values in (target, edm.inputs(corrupt(edm, batch), sigma)[0]):
        assert values.view(9, 4000).std(dim=1).tolist() == pytest.approx([1] * 9, abs=0.05)


def test_the_direction_term_is_one_minus_the_cosine_of_velocities_over_channels() -> None:
    t, (x_0, noise, output) = torch.rand(6), torch.randn(3, 6, 4, 5, 5)
    flow, batch = Flow(direction_weight=0.5), Batch(x_0, noise, t, {})
    losses = flow.losses(output, batch, corrupt(flow, batch))
    velocity = noise - x_0
    cosine = (output * velocity).sum(1) / (output.norm(dim=1) * velocity.norm(dim=1))
    torch.testing.assert_close(losses["direction"], (1 - cosine).flatten(1).mean(1))
    assert torch.equal(losses["mse"], Flow().losses(output, batch, x_0)["loss"])
    torch.testing.assert_close(losses["loss"], losses["mse"] + 0.5 * losses["direction"])
    assert flow.losses(3 * velocity, batch, x_0)["direction"].abs().max() < 1e-6
    through_noise = Flow(prediction=PredictNoise(), direction_weight=1.0)
    c, inside = through_noise.coefficients(t), corrupt(flow, batch)
    of_noise = output_of(PredictNoise(), *PredictVelocity().ends(output, inside, c), c)
    torch.testing.assert_close(
        through_noise.losses(of_noise, batch, inside)["direction"], losses["direction"], rtol=1e-3, atol=1e-3
    )


def test_the_direction_term_has_a_moderate_gradient_where_training_begins() -> None:
    """Compare with the gradient of the squared error at an output of 0, which the last layer begins with."""
    t, (x_0, noise) = torch.rand(6), torch.randn(2, 6, 4, 5, 5)
    output = torch.zeros(6, 4, 5, 5, requires_grad=True)
    losses = Flow(direction_weight=1.0).losses(output, Batch(x_0, noise, t, {}), x_0)
    main, direction = (
        torch.autograd.grad(losses[name].sum(), output, retain_graph=True)[0] for name in ("mse", "direction")
    )
    assert 0 < direction.norm() < 100 * main.norm()
    assert torch.nn.functional.cosine_similarity(main, direction, dim=1).min() > 0.999


def test_a_network_of_the_released_sit_program_is_read_by_our_time() -> None:
    """Check that it sees 1 - t, that the half that nothing reads is left out, and that only a velocity is negated."""
    output, t = torch.randn(2, 8, 4, 4), torch.tensor([0.2, 0.7])
    flow = sit_flow("Linear", "velocity")
    assert flow.outputs_per_channel == 2
    assert flow.inputs(output, t)[1].tolist() == (1 - t).tolist()
    assert torch.equal(flow.velocity(output, torch.randn(2, 4, 4, 4), t), -output[:, :4])
    assert torch.equal(sit_flow("Linear", "noise").read(output, output[:, 4:]), output[:, :4])


@pytest.mark.parametrize("objective", [gaussian(PredictV(), MinSNR()), *continuous_objectives()], ids=name_with_parts)
def test_an_objective_reads_nothing_back_from_the_device(objective: Objective) -> None:
    """Compute a loss on the meta device, where reading a value raises."""
    x_0 = torch.empty(2, 2, 4, 4, device="meta")
    t = torch.empty(2, device="meta", dtype=torch.from_numpy(np.empty(0, objective.times.dtype)).dtype)
    batch = Batch(x_0, x_0, t, {})
    x_t = corrupt(objective.to("meta"), batch)
    assert objective.losses(objective.inputs(x_t, t)[0], batch, x_t)["loss"].is_meta


def test_a_shift_by_resolution_is_the_root_of_the_dimension_over_4096() -> None:
    latents = LatentFacts(768 * 16 * 16, 1.0)
    assert Flow.settled({"shift": "resolution"}, latents)["shift"] == pytest.approx(6.928, abs=1e-3)
    assert Flow.settled({"shift": 3.0}, latents) == {"shift": 3.0}
    assert Flow.settled({"shift": "resolution"}, LatentFacts(4096, 1.0))["shift"] == 1


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: MinSNR(0.0), r"diffusion.weighting.gamma is 0.0, but min-SNR needs a finite number above 0"),
        (lambda: MinSNR(-5.0), r"diffusion.weighting.gamma is -5.0"),
        (lambda: MinSNR(math.nan), r"diffusion.weighting.gamma is nan"),
        (lambda: EDM(), r"diffusion.sigma_data is missing, and there are no shards whose statistics give it"),
        (lambda: EDM(0.0), r"diffusion.sigma_data is 0.0"),
        (lambda: EDM(0.5, sigma_min=90.0), r"diffusion.sigma_min is 90.0 and diffusion.sigma_max is 80.0"),
        (lambda: EDM(0.5, UniformTimes()), "trains on noise levels, but diffusion.times is a UniformTimes"),
        (lambda: Flow(times=LogNormalLevels()), "diffusion=flow needs times between 0 and 1, but diffusion/times=log_"),
        (lambda: Flow(shift="resolution"), r"diffusion.shift is 'resolution', but there are no shards"),
        (lambda: Flow(shift=0.0), r"diffusion.shift is 0.0, but it must be above 0"),
        (lambda: Flow(direction_weight=-1.0), r"diffusion.direction_weight is -1.0"),
        (lambda: VPPath(beta_min=30.0), r"diffusion.path has beta_min 30.0 and beta_max 20.0"),
        (lambda: LogitNormalTimes(scale=0.0), r"location 0.0 and scale 0.0, but logit_normal needs"),
        (lambda: gaussian(PredictVelocity()), "diffusion/prediction=velocity needs a path that is continuous in time"),
        (lambda: gaussian(PredictNoise(), OfLikelihood()), "diffusion/weighting=likelihood needs a path"),
        (
            lambda: Heun().require(gaussian(PredictX0())),
            "needs diffusion/prediction=noise or v, but the objective",
        ),
        (lambda: DPMSolverPP().require(gaussian(PredictScore())), "diffusion/prediction=score; use diffusion/sampler="),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_sentence(made: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        made()
    assert str(caught.value).endswith(".")
