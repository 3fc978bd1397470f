"""The diffusion process equals ADM's numbers and closed forms."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from test_model import golden_model, tiny, trained
from torch import Tensor

from core.batch import Batch, Condition, Denoiser
from data.conditions import ClassLabels
from diffusion.diffusers_samplers import DPMSolverPP, Heun
from diffusion.gaussians import Gaussian, gaussian_kl
from diffusion.guidance import Autoguidance, ClassifierFreeGuidance, Unguided
from diffusion.likelihood import bits_per_dimension, prior_bits
from diffusion.objective import corrupt
from diffusion.process import GaussianDiffusion
from diffusion.respacing import Steps, kept_steps
from diffusion.samplers import DDIM, DDPM, Sampler
from diffusion.schedules import CosineSchedule, LinearSchedule, ScaledLinearSchedule, Schedule
from diffusion.variances import FixedLargeVariance, FixedSmallVariance, LearnedRangeVariance, Variance
from model.blocks import AdaLNZeroBlock
from model.released import from_reference, to_reference

NULL = ClassLabels(10).null


@pytest.fixture
def process() -> GaussianDiffusion:
    return GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())


def test_schedule_tables_equal_the_released_ones(process: GaussianDiffusion) -> None:
    _, golden = golden_model()
    for name in (key for key in golden if key.startswith("schedule/")):
        table = getattr(process.tables, name.removeprefix("schedule/"))
        np.testing.assert_allclose(table, golden[name].numpy(), rtol=1e-12, atol=1e-15, err_msg=name)


def test_losses_equal_the_released_implementation(process: GaussianDiffusion) -> None:
    model, golden = golden_model()
    x_0, noise, t, label = (golden[f"loss/{name}"] for name in ("x0", "noise", "t", "y"))
    batch = Batch(x_0, noise, t, {"label": label})
    x_t = corrupt(process, batch)
    torch.testing.assert_close(x_t, golden["loss/x_t"], rtol=1e-6, atol=1e-6)
    losses = process.losses(model(*process.inputs(x_t, t), batch.condition), batch, x_t)
    torch.testing.assert_close(losses["mse"], golden["loss/mse"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["vlb"], golden["loss/vb"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["loss"], golden["loss/total"], rtol=1e-5, atol=0)


def test_gradients_equal_the_released_implementation(process: GaussianDiffusion) -> None:
    _, golden = golden_model()
    weights = {name.removeprefix("weights/"): golden[name] for name in golden if name.startswith("weights/")}
    model = from_reference(weights, num_heads=4)
    x_0, noise, t, label = (golden[f"loss/{name}"] for name in ("x0", "noise", "t", "y"))
    batch = Batch(x_0, noise, t, {"label": label})
    x_t = corrupt(process, batch)
    process.losses(model(x_t, t, batch.condition), batch, x_t)["loss"].mean().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad  # so that to_reference gives gradients under the released names
    norms = {name: value.double().norm().item() for name, value in to_reference(model).items()}
    for name in (key for key in golden if key.startswith("grad_norm/")):
        found = norms[name.removeprefix("grad_norm/")]
        assert found == pytest.approx(golden[name].item(), rel=1e-4), name


def exact_reverse(process: GaussianDiffusion, mean: float, std: float) -> Denoiser:
    """Return `perfect_denoiser` with the reverse process's true variance, beta~ + coef1^2 Var(x_0 | x_t), as logits."""
    noise_of = perfect_denoiser(process, mean, std)

    def denoiser(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        noise = noise_of(x_t, t, condition)[:, :1]
        signal, spread = process.table("sqrt_alphas_cumprod", t), process.table("sqrt_one_minus_alphas_cumprod", t)
        uncertainty = (std * spread) ** 2 / ((signal * std) ** 2 + spread**2)
        beta_tilde = torch.from_numpy(process.tables.posterior_variance)[t].float().view(-1, 1, 1, 1)
        variance = beta_tilde + process.table("posterior_mean_coef1", t) ** 2 * uncertainty
        low, high = process.table("posterior_log_variance_clipped", t), process.table("log_betas", t)
        logits = 2 * (torch.log(variance) - low) / (high - low) - 1
        return torch.cat([noise, logits.expand_as(noise)], dim=1)

    return denoiser


def test_the_bound_of_the_exact_model_is_the_entropy_of_the_data(process: GaussianDiffusion) -> None:
    """Compare with x_0 ~ N(m, s^2) in bins of 2/255, whose entropy is h / ln 2 - log2(2/255) bits per dimension."""
    mean, std = 0.1, 0.2
    generator = torch.Generator().manual_seed(0)
    x_0 = mean + std * torch.randn(256, 1, 8, 8, generator=generator)

    def noise(draw: int) -> Tensor:
        return torch.randn(x_0.shape, generator=generator)

    bits = bits_per_dimension(exact_reverse(process, mean, std), process, x_0, {}, noise)
    entropy = 0.5 * np.log(2 * np.pi * np.e * std**2) / np.log(2) - np.log2(2 / 255)
    assert bits.shape == (256,)
    assert bits.mean().item() == pytest.approx(entropy, abs=0.03)
    worse = bits_per_dimension(perfect_denoiser(process, mean, std), process, x_0, {}, noise)
    assert worse.mean() > bits.mean() + 0.1  # the right mean with too small a variance


def test_the_prior_term_is_the_closed_form(process: GaussianDiffusion) -> None:
    x_0 = torch.full((1, 1, 2, 2), 0.5)
    alpha = process.tables.alphas_cumprod[-1]
    expected = 0.5 * (-np.log(1 - alpha) - 1 + (1 - alpha) + alpha * 0.25) / np.log(2)
    assert prior_bits(process, x_0).item() == pytest.approx(expected, rel=0.05, abs=1e-7)


def test_ddpm_trajectory_equals_the_released_implementation(process: GaussianDiffusion) -> None:
    model, golden = golden_model()
    start, noises = golden["sample/10/z"], golden["sample/10/noises"]

    def noise(draw: int) -> Tensor:
        return start if draw == 0 else noises[draw - 1]

    with torch.no_grad():
        sample = DDPM(10)(model, process, noise, {"label": golden["sample/10/y"]})
    final = golden["sample/10/final"]
    assert (sample - final).abs().max() / final.abs().max() < 1e-4


def test_guidance_of_three_channels_equals_the_released_implementation() -> None:
    model, golden = golden_model()
    half = len(golden["cfg/x"]) // 2  # the released code takes both halves of the batch from outside
    guided = ClassifierFreeGuidance(model, NULL, 4, scale=float(golden["cfg/scale"]), channels=3)
    with torch.no_grad():
        output = guided(golden["cfg/x"][:half], golden["cfg/t"][:half], {"label": golden["cfg/y"][:half]})
    torch.testing.assert_close(output, golden["cfg/out_three_channels"][:half], rtol=1e-5, atol=1e-5)


def test_guidance_of_scale_one_is_no_guidance() -> None:
    model, golden = golden_model()
    inputs = golden["forward/x"], golden["forward/t"], {"label": golden["forward/y"]}
    guided = ClassifierFreeGuidance(model, NULL, 4, scale=1.0)
    plain = Unguided(model, null=NULL, latent_channels=4)
    with torch.no_grad():
        torch.testing.assert_close(guided(*inputs), plain(*inputs), rtol=1e-5, atol=1e-5)


def test_guidance_changes_the_noise_and_keeps_the_variance() -> None:
    model, golden = golden_model()
    inputs = golden["forward/x"], golden["forward/t"], {"label": golden["forward/y"] % 10}
    with torch.no_grad():
        plain, guided = model(*inputs), ClassifierFreeGuidance(model, NULL, 4, scale=3.0)(*inputs)
    assert not torch.allclose(guided[:, :4], plain[:, :4], atol=1e-3)
    torch.testing.assert_close(guided[:, 4:], plain[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("settings", "words"), [({"scale": -1.0}, "scale is -1"), ({"channels": 5}, "channels is 5")])
def test_impossible_guidance_is_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClassifierFreeGuidance(golden_model()[0], NULL, 4, **settings)  # type: ignore[arg-type]


def test_predicting_x_0_inverts_the_corruption(process: GaussianDiffusion) -> None:
    t = torch.tensor([0, 1, 250, 600])
    x_0, noise = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4)
    x_t = corrupt(process, Batch(x_0, noise, t, {}))
    found = process.prediction(torch.cat([noise, noise], dim=1), x_t, t).x_0
    torch.testing.assert_close(found, x_0, rtol=1e-3, atol=1e-4)


def test_posterior_is_bayes_rule(process: GaussianDiffusion) -> None:
    """Compute q(x_{t-1} | x_t, x_0) from the product of the two Gaussians, in float64."""
    t, x_0, x_t = 300, 0.7, -0.4
    tables = process.tables
    before, beta = tables.alphas_cumprod[t - 1], tables.betas[t]
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (np.sqrt(before) * x_0 / (1 - before) + np.sqrt(1 - beta) * x_t / beta) / precision
    found = process.q_posterior(torch.full((1, 1, 1, 1), x_0), torch.full((1, 1, 1, 1), x_t), torch.tensor([t]))
    assert found.mean.item() == pytest.approx(mean, rel=1e-5)
    assert found.log_variance.item() == pytest.approx(-np.log(precision), rel=1e-5)


def test_kl_is_zero_for_equal_gaussians_and_positive_otherwise() -> None:
    mean, log_variance = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    same = Gaussian(mean, log_variance)
    assert gaussian_kl(same, same).abs().max() == 0
    assert (gaussian_kl(same, Gaussian(mean + 0.1, log_variance - 0.3)) > 0).all()


def test_vlb_vanishes_for_the_exact_posterior(process: GaussianDiffusion) -> None:
    """Check that a network that predicts the true noise and the lower variance bound has KL 0 for t > 0."""
    t = torch.tensor([1, 10, 400, 999])
    x_0, noise = torch.rand(4, 1, 4, 4) * 2 - 1, torch.randn(4, 1, 4, 4)
    x_t = corrupt(process, Batch(x_0, noise, t, {}))
    exact = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    assert process.vlb_term(process.prediction(exact, x_t, t), x_0, x_t, t).abs().max() < 1e-4
    worse = torch.cat([noise + 0.1, torch.ones_like(noise)], dim=1)
    assert (process.vlb_term(process.prediction(worse, x_t, t), x_0, x_t, t) > 0).all()


def test_vlb_sends_no_gradient_to_the_noise_prediction(process: GaussianDiffusion) -> None:
    output = torch.randn(2, 2, 4, 4, requires_grad=True)
    x_0, noise, t = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([5, 500])
    batch = Batch(x_0, noise, t, {})
    process.losses(output, batch, corrupt(process, batch))["vlb"].sum().backward()
    assert output.grad is not None
    assert (output.grad[:, :1] == 0).all()
    assert (output.grad[:, 1:] != 0).any()


def perfect_denoiser(process: GaussianDiffusion, mean: float, std: float) -> Denoiser:
    """Return the best noise prediction for x_0 ~ N(mean, std^2), which is known in closed form."""

    def denoiser(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        signal, spread = process.table("sqrt_alphas_cumprod", t), process.table("sqrt_one_minus_alphas_cumprod", t)
        noise = spread * (x_t - signal * mean) / (signal**2 * std**2 + spread**2)
        return torch.cat([noise, -torch.ones_like(noise)], dim=1)

    return denoiser


@pytest.mark.parametrize("sampler", [DDPM(steps=1000), DDIM(steps=250), DDIM(steps=1000, eta=1.0)])
def test_samplers_give_a_gaussian_its_mean_and_variance(process: GaussianDiffusion, sampler: Sampler) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(draw: int) -> Tensor:
        return torch.randn(4000, 1, 1, 1, generator=generator)

    sample = sampler(perfect_denoiser(process, 0.4, 0.5), process, noise, {})
    assert sample.mean().item() == pytest.approx(0.4, abs=0.03)
    assert sample.std().item() == pytest.approx(0.5, rel=0.05)


def continuous_denoiser(process: GaussianDiffusion, mean: float, std: float) -> Denoiser:
    """Return `perfect_denoiser` for times between steps: alphas_cumprod are interpolated like diffusers' sigmas."""
    steps, alphas = np.arange(1000), process.tables.alphas_cumprod
    sigmas = np.sqrt((1 - alphas) / alphas)

    def denoiser(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        sigma = torch.from_numpy(np.interp(t.numpy(), steps, sigmas)).float().view(-1, 1, 1, 1)
        signal, spread = 1 / torch.sqrt(1 + sigma**2), sigma / torch.sqrt(1 + sigma**2)
        noise = spread * (x_t - signal * mean) / (signal**2 * std**2 + spread**2)
        return torch.cat([noise, -torch.ones_like(noise)], dim=1)

    return denoiser


@pytest.mark.parametrize(
    ("sampler", "order", "last_error"),
    [
        (DDIM, 1, 0.05),
        (partial(DPMSolverPP, order=1), 1, 0.05),
        (DPMSolverPP, 2, 0.003),
        (Heun, 2, 0.002),
    ],
)
def test_deterministic_samplers_converge_to_the_exact_solution_with_their_order(
    process: GaussianDiffusion, sampler: Callable[..., Sampler], order: int, last_error: float
) -> None:
    """Compare with the probability-flow ODE of a Gaussian: x_0 = m + (x_T - a m) s / sqrt(a^2 s^2 + b^2)."""
    mean, std, start = 0.4, 0.5, torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    last = process.tables.alphas_cumprod[-1]
    exact = mean + (start - np.sqrt(last) * mean) * std / np.sqrt(last * std**2 + 1 - last)
    errors = []
    for steps in (10, 20, 40, 80):
        noise = start / np.sqrt(1 - last) if sampler is Heun else start  # Heun's starts at pure noise, not at x_T
        found = sampler(steps=steps)(continuous_denoiser(process, mean, std), process, lambda _, x=noise: x, {})
        errors.append((found - exact).abs().max().item())
    assert errors[-1] < last_error
    assert np.log2(errors[0] / errors[-1]) / 3 > order - 0.15


@pytest.mark.parametrize("sampler", [DDPM(4), DDIM(4), DDIM(4, eta=1.0), DPMSolverPP(4), Heun(4)])
def test_sampling_reads_nothing_back_from_the_device(process: GaussianDiffusion, sampler: Sampler) -> None:
    """Sample on the meta device, where reading a value raises."""
    model = tiny().to("meta")
    guided = ClassifierFreeGuidance(model, NULL, 4, scale=2.0, t_min=100, t_max=900)
    condition = {"label": torch.zeros(2, dtype=torch.int64, device="meta")}

    def noise(draw: int) -> Tensor:
        return torch.empty(2, 4, 8, 8, device="meta")

    sample = sampler(guided, process.to("meta"), noise, condition)
    assert sample.shape == (2, 4, 8, 8)
    assert sample.is_meta


def test_an_order_that_the_solver_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler.order is 4"):
        DPMSolverPP(order=4)


def test_ddim_trajectory_equals_the_released_implementation(process: GaussianDiffusion) -> None:
    model, golden = golden_model()
    with torch.no_grad():
        sample = DDIM("ddim10")(
            model, process, lambda _: golden["sample/ddim10/z"], {"label": golden["sample/ddim10/y"]}
        )
    final = golden["sample/ddim10/final"]
    assert (sample - final).abs().max() / final.abs().max() < 1e-4


def test_an_eta_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler.eta is 2"):
        DDIM(eta=2)


@pytest.mark.parametrize("sampler", [DDPM(6), DDPM("2,3"), DDIM("ddim10"), DPMSolverPP(6), Heun(6)])
def test_a_sampler_says_how_often_it_calls_the_network(process: GaussianDiffusion, sampler: Sampler) -> None:
    calls = 0
    known = perfect_denoiser(process, 0.4, 0.5)

    def counted(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        nonlocal calls
        calls += 1
        return known(x_t, t.long(), condition)

    sampler.require(process)
    sampler(counted, process, lambda _: torch.randn(2, 1, 4, 4), {})
    assert calls == sampler.calls()


def test_guidance_says_what_a_call_costs() -> None:
    def network(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return x_t

    def small(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return x_t

    cost = {network: 100, small: 7}.__getitem__
    assert Unguided(network, NULL, 4).cost(cost) == 100
    assert ClassifierFreeGuidance(network, NULL, 4).cost(cost) == 200
    assert Autoguidance(network, NULL, 4, guide=small).cost(cost) == 107


def test_a_limited_interval_guides_inside_it_only() -> None:
    model, golden = golden_model()
    x_t, condition = golden["forward/x"], {"label": golden["forward/y"] % 10}
    t = torch.tensor([0, 99, 500, 900])
    with torch.no_grad():
        plain = model(x_t, t, condition)
        everywhere = ClassifierFreeGuidance(model, NULL, 4, scale=3.0)(x_t, t, condition)
        limited = ClassifierFreeGuidance(model, NULL, 4, scale=3.0, t_min=100, t_max=600)(x_t, t, condition)
    torch.testing.assert_close(limited[[0, 1, 3]], plain[[0, 1, 3]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(limited[2], everywhere[2], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"t_max 1 is below guidance.t_min 2"):
        ClassifierFreeGuidance(model, NULL, 4, t_min=2, t_max=1)


def test_autoguidance_extrapolates_from_the_worse_model() -> None:
    good, golden = golden_model()
    bad = trained(AdaLNZeroBlock, seed=1)
    inputs = golden["forward/x"], golden["forward/t"], {"label": golden["forward/y"]}
    with torch.no_grad():
        by_one = Autoguidance(good, NULL, 4, guide=bad, scale=1.0)(*inputs)
        by_two = Autoguidance(good, NULL, 4, guide=bad, scale=2.0)(*inputs)
        torch.testing.assert_close(by_one, good(*inputs), rtol=1e-4, atol=1e-4)
        expected = 2 * good(*inputs)[:, :4] - bad(*inputs)[:, :4]
    torch.testing.assert_close(by_two[:, :4], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", [LinearSchedule(), ScaledLinearSchedule(), CosineSchedule()])
def test_schedules_go_from_data_to_noise(schedule: Schedule) -> None:
    tables = GaussianDiffusion(schedule, LearnedRangeVariance()).tables
    assert ((tables.betas > 0) & (tables.betas < 1)).all()
    assert (np.diff(tables.alphas_cumprod) < 0).all()
    assert tables.alphas_cumprod[0] > 0.99
    assert tables.alphas_cumprod[-1] < 0.01


def test_the_cosine_schedule_follows_its_equation() -> None:
    tables = GaussianDiffusion(CosineSchedule(), LearnedRangeVariance()).tables
    t = 499  # the 500th of 1,000 steps: halfway
    expected = np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert tables.alphas_cumprod[t] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("variance", "table"), [(FixedLargeVariance(), "betas"), (FixedSmallVariance(), None)])
def test_fixed_variances_are_the_bounds(variance: Variance, table: str | None) -> None:
    process = GaussianDiffusion(LinearSchedule(), variance)
    t, x_t = torch.tensor([0, 400]), torch.randn(2, 1, 4, 4)
    found = process.prediction(torch.randn(2, 1, 4, 4), x_t, t).log_variance
    assert found is not None
    found = found.flatten()
    tables = process.tables
    assert found[0].item() == pytest.approx(np.log(tables.posterior_variance[1]), rel=1e-5)
    expected = tables.betas[400] if table else tables.posterior_variance[400]
    assert found[1].item() == pytest.approx(np.log(expected), rel=1e-5)
    losses = process.losses(torch.randn(2, 1, 4, 4), Batch(x_t, x_t, t, {}), x_t)
    assert torch.equal(losses["loss"], losses["mse"])
    assert process.outputs_per_channel == 1


def test_respacing_keeps_both_ends() -> None:
    assert kept_steps(1000, 10).tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert kept_steps(1000, "10").tolist() == kept_steps(1000, 10).tolist()
    assert kept_steps(1000, 1000).tolist() == list(range(1000))
    for steps in (2, 7, 50, 250, 999):
        kept = kept_steps(1000, steps)
        assert (len(kept), kept[0], kept[-1]) == (steps, 0, 999)
        assert (np.diff(kept) > 0).all()


def test_sections_are_spaced_on_their_own() -> None:
    assert kept_steps(10, [2, 3]).tolist() == [0, 4, 5, 7, 9]
    assert kept_steps(10, "2,3").tolist() == [0, 4, 5, 7, 9]
    assert kept_steps(11, [1, 2]).tolist() == [0, 6, 10]  # the first section is the longer one
    assert kept_steps(1000, "ddim50").tolist() == list(range(0, 1000, 20))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (1001, "sampler.steps is 1001, but the process was trained with 1000"),
        (1, "needs at least 2 steps"),
        ([600, 10], "sampler.steps is 600, but the process was trained with 500 steps there"),
        ("ddim300", "no whole stride takes 300 of 1000"),
        ("many", "must be like 250, ddim50"),
    ],
)
def test_steps_that_there_are_not_are_refused(steps: Steps, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kept_steps(1000, steps)


def test_respaced_process_keeps_the_noise_levels(process: GaussianDiffusion) -> None:
    kept = kept_steps(1000, 7)
    respaced = process.respace(kept)
    np.testing.assert_allclose(respaced.tables.alphas_cumprod, process.tables.alphas_cumprod[kept], rtol=1e-12)
    assert respaced.timesteps.tolist() == kept.tolist()


def test_an_impossible_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="needs num_steps in 1 to 100000"):
        LinearSchedule(1000, 0.1, 0.01)
