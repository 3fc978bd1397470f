"""The process against ADM's numbers and against closed forms."""

import numpy as np
import pytest
import torch
from test_model import golden_model
from torch import Tensor

from diffusion.guidance import ClassifierFreeGuidance, unguided
from diffusion.losses import diffusion_losses, gaussian_kl, vlb_term
from diffusion.process import Gaussian, GaussianDiffusion
from diffusion.respacing import evenly_spaced
from diffusion.samplers import ddpm
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance


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
    x_t = process.q_sample(x_0, t, noise)
    torch.testing.assert_close(x_t, golden["loss/x_t"], rtol=1e-6, atol=1e-6)
    losses = diffusion_losses(process, model(x_t, t, label), x_0, x_t, t, noise)
    torch.testing.assert_close(losses.mse, golden["loss/mse"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.vlb, golden["loss/vb"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.total, golden["loss/total"], rtol=1e-5, atol=0)


def test_ddpm_trajectory_equals_the_released_implementation(process: GaussianDiffusion) -> None:
    model, golden = golden_model()
    start, noises = golden["sample/10/z"], golden["sample/10/noises"]

    def noise(draw: int) -> Tensor:
        return start if draw == 0 else noises[draw - 1]

    with torch.no_grad():
        sample = ddpm(model, process, noise, golden["sample/10/y"], steps=10)
    final = golden["sample/10/final"]
    assert (sample - final).abs().max() / final.abs().max() < 1e-4


def test_guidance_of_three_channels_equals_the_released_implementation() -> None:
    model, golden = golden_model()
    half = len(golden["cfg/x"]) // 2  # the released code takes both halves of the batch from outside
    guided = ClassifierFreeGuidance(model, 10, 4, scale=float(golden["cfg/scale"]), channels=3)
    with torch.no_grad():
        output = guided(golden["cfg/x"][:half], golden["cfg/t"][:half], golden["cfg/y"][:half])
    torch.testing.assert_close(output, golden["cfg/out_three_channels"][:half], rtol=1e-5, atol=1e-5)


def test_guidance_of_scale_one_is_no_guidance() -> None:
    model, golden = golden_model()
    inputs = golden["forward/x"], golden["forward/t"], golden["forward/y"]
    guided = ClassifierFreeGuidance(model, 10, 4, scale=1.0)
    plain = unguided(model, num_classes=10, latent_channels=4)
    with torch.no_grad():
        torch.testing.assert_close(guided(*inputs), plain(*inputs), rtol=1e-5, atol=1e-5)


def test_guidance_changes_the_noise_and_keeps_the_variance() -> None:
    model, golden = golden_model()
    inputs = golden["forward/x"], golden["forward/t"], golden["forward/y"] % 10
    with torch.no_grad():
        plain, guided = model(*inputs), ClassifierFreeGuidance(model, 10, 4, scale=3.0)(*inputs)
    assert not torch.allclose(guided[:, :4], plain[:, :4], atol=1e-3)
    torch.testing.assert_close(guided[:, 4:], plain[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("settings", "words"), [({"scale": -1.0}, "scale is -1"), ({"channels": 5}, "channels is 5")])
def test_impossible_guidance_is_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClassifierFreeGuidance(golden_model()[0], 10, 4, **settings)  # type: ignore[arg-type]


def test_predicting_x_0_inverts_q_sample(process: GaussianDiffusion) -> None:
    t = torch.tensor([0, 1, 250, 600])
    x_0, noise = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4)
    x_t = process.q_sample(x_0, t, noise)
    torch.testing.assert_close(process.predict_x_0(x_t, t, noise), x_0, rtol=1e-3, atol=1e-4)


def test_posterior_is_bayes_rule(process: GaussianDiffusion) -> None:
    """q(x_{t-1} | x_t, x_0) from the product of the two Gaussians, in float64."""
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
    """A network that predicts the true noise and the lower variance bound has KL 0 for t > 0."""
    t = torch.tensor([1, 10, 400, 999])
    x_0, noise = torch.rand(4, 1, 4, 4) * 2 - 1, torch.randn(4, 1, 4, 4)
    x_t = process.q_sample(x_0, t, noise)
    exact = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    assert vlb_term(process, exact, x_0, x_t, t).abs().max() < 1e-4
    worse = torch.cat([noise + 0.1, torch.ones_like(noise)], dim=1)
    assert (vlb_term(process, worse, x_0, x_t, t) > 0).all()


def test_vlb_sends_no_gradient_to_the_noise_prediction(process: GaussianDiffusion) -> None:
    output = torch.randn(2, 2, 4, 4, requires_grad=True)
    x_0, noise, t = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([5, 500])
    diffusion_losses(process, output, x_0, process.q_sample(x_0, t, noise), t, noise).vlb.sum().backward()
    assert output.grad is not None
    assert (output.grad[:, :1] == 0).all()
    assert (output.grad[:, 1:] != 0).any()


def test_ddpm_samples_a_gaussian_with_its_mean_and_variance(process: GaussianDiffusion) -> None:
    """For x_0 ~ N(m, s^2) the best noise prediction is known in closed form."""
    mean, std = 0.4, 0.5

    def perfect(x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        signal, spread = process.table("sqrt_alphas_cumprod", t), process.table("sqrt_one_minus_alphas_cumprod", t)
        noise = spread * (x_t - signal * mean) / (signal**2 * std**2 + spread**2)
        return torch.cat([noise, -torch.ones_like(noise)], dim=1)

    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(4000, dtype=torch.int64)
    sample = ddpm(perfect, process, lambda draw: torch.randn(4000, 1, 1, 1, generator=generator), label, steps=1000)
    assert sample.mean().item() == pytest.approx(mean, abs=0.03)
    assert sample.std().item() == pytest.approx(std, rel=0.05)


def test_respacing_keeps_both_ends_and_refuses_more_steps_than_trained() -> None:
    assert evenly_spaced(1000, 10).tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert evenly_spaced(1000, 1000).tolist() == list(range(1000))
    for steps in (2, 7, 50, 250, 999):
        kept = evenly_spaced(1000, steps)
        assert kept[0] == 0
        assert kept[-1] == 999
        assert (np.diff(kept) > 0).all()
    with pytest.raises(ValueError, match=r"sampler.steps is 1001, but the process was trained with 1000"):
        evenly_spaced(1000, 1001)


def test_respaced_process_keeps_the_noise_levels(process: GaussianDiffusion) -> None:
    kept = evenly_spaced(1000, 7)
    respaced = process.respace(kept)
    np.testing.assert_allclose(respaced.tables.alphas_cumprod, process.tables.alphas_cumprod[kept], rtol=1e-12)
    assert respaced.timesteps.tolist() == kept.tolist()


def test_a_learned_variance_refuses_a_network_without_logits(process: GaussianDiffusion) -> None:
    with pytest.raises(ValueError, match="needs 2 output channels, but the network has 1"):
        process.variance.split(torch.zeros(1, 1, 4, 4), channels=1)


def test_an_impossible_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="needs num_steps >= 1"):
        LinearSchedule(1000, 0.1, 0.01)
