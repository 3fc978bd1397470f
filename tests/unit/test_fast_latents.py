"""Compiled latents are bit for bit those of PyTorch's operations, for every number of float16."""

import numpy as np
import pytest
import torch
from torch import Tensor

import core.latents
from core.deferred import Deferred
from core.latents import drawn_latents, load_latents

SHIFTS = [[0.0], [0.1, -0.2, 0.3]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.latents, "FAST_LATENTS", Deferred("latents", load_latents, worth=0))


def per_channel(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def by_pytorch(moments: Tensor, posterior: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute in the order of operations of earlier versions."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    latent = mean + torch.exp(0.5 * log_variance) * posterior
    return (latent - shift) * scale


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 3, 1, 1), (2, 3, 7, 5), (33, 3, 32, 32)])
def test_latents_are_those_of_pytorch(shape: tuple[int, ...], shift: list[float]) -> None:
    numbers = torch.Generator().manual_seed(sum(shape))
    moments = torch.randn(shape[0], 6, *shape[2:], generator=numbers).mul_(5).half()
    inputs = (moments, torch.randn(shape, generator=numbers), per_channel(shift), per_channel([0.18215]))
    assert core.latents.FAST_LATENTS.get(1) is not None
    assert torch.equal(drawn_latents(*inputs), by_pytorch(*inputs))


@pytest.mark.usefixtures("compiled")
def test_each_number_of_float16_as_mean_and_as_log_variance_gives_pytorchs_latent() -> None:
    every = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.float16))
    moments = torch.stack([every, every.flip(0), every.roll(7777), every], 0).view(1, 4, 256, 256)
    posterior = torch.randn(1, 2, 256, 256, generator=torch.Generator().manual_seed(1))
    inputs = (moments, posterior, per_channel([0.05]), per_channel([0.5, 2.0]))
    found, expected = drawn_latents(*inputs), by_pytorch(*inputs)
    numbers = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["float32", "strided"])
def test_other_moments_are_computed_by_pytorch(kind: str) -> None:
    moments, posterior = torch.randn(4, 6, 5, 5), torch.randn(4, 3, 5, 5)
    moments = moments if kind == "float32" else moments.half().transpose(2, 3)
    inputs = (moments, posterior, per_channel([0.0]), per_channel([1.0]))
    assert torch.equal(drawn_latents(*inputs), by_pytorch(*inputs))
