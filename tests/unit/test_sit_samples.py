"""Samples of SiT's tiny network equal those of SiT's own program, for each of its samplers."""

from collections.abc import Callable

import pytest
import torch
from sit import sit_flow, sit_golden, sit_network
from torch import Tensor

from diffusion.ode_samplers import Dopri5, Euler, HeunOde
from diffusion.samplers import Sampler
from diffusion.sde_samplers import EulerMaruyama, StochasticHeun

ODE = {"euler": Euler, "heun2": HeunOde}
SDE = {"Euler": EulerMaruyama, "Heun": StochasticHeun}


def named(prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in sit_golden() if name.startswith(prefix)]


def sampled(sampler: Sampler, path: str, prediction: str, noise: Callable[[int], Tensor]) -> Tensor:
    flow = sit_flow(path, prediction)
    sampler.require(flow)
    with torch.no_grad():
        return sampler(sit_network(), flow, noise, {"label": sit_golden()["sample/y"]})


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference in units of the expected norm."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", named("sample/ode/"))
def test_a_deterministic_sample_equals_sits(name: str) -> None:
    """SiT's number of steps is that of the ends of steps: 12 are 11 steps."""
    path, prediction, method, ends = name.split("/")
    sampler: Sampler = Dopri5() if method == "dopri5" else ODE[method](int(ends) - 1)
    found = sampled(sampler, path, prediction, lambda _: sit_golden()["sample/z"])
    expected = sit_golden()[f"sample/ode/{name}"]
    assert distance(found, expected) < (1e-3 if method == "dopri5" else 1e-4)  # its relative tolerance


@pytest.mark.parametrize("name", named("sample/sde/"))
def test_a_stochastic_sample_equals_sits_with_the_same_noise(name: str) -> None:
    """SiT's number of steps counts the last one, and one more where there is none: 12 are 11 steps with noise."""
    path, prediction, method, form, last, steps = name.split("/")
    noises = [sit_golden()["sample/z"], *sit_golden()["sample/sde_noises"]]
    sampler = SDE[method](
        steps=int(steps) - (last == "None"),
        diffusion=form.lower().replace("-", "_"),  # type: ignore[arg-type]
        last_step=last.lower(),  # type: ignore[arg-type]
    )
    found = sampled(sampler, path, prediction, noises.__getitem__)
    assert distance(found, sit_golden()[f"sample/sde/{name}"]) < 1e-4


def test_the_file_has_each_kind_of_sample() -> None:
    """Check that no test above passes for want of cases."""
    assert len(named("sample/ode/")) == 7
    assert len(named("sample/sde/")) == 8
