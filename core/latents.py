"""Draw latents from the moments of a Gaussian posterior: mean + exp(log-variance / 2) x noise, shifted and scaled."""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.deferred import Deferred
from core.samples import Latents


def drawn_latents(
    moments: Tensor, posterior: Tensor, shift: Tensor, scale: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return latents [B, c, h, w] float32 from moments [B, 2c, h, w] and standard normals [B, c, h, w].

    ``shift`` and ``scale`` are [1, 1 or c, 1, 1]. Latents are written to ``out`` if given, which is contiguous and may
    be ``posterior``. A compiled function draws from many moments in float16 on the CPU,
    with the same bits.
    """
    if _is_for_compiled(moments, posterior) and (compiled := FAST_LATENTS.get(posterior.numel())):
        return compiled.latents(moments, posterior, shift, scale, torch.empty_like(posterior) if out is None else out)
    latents = _by_pytorch(moments, posterior, shift, scale)
    return latents if out is None else out.copy_(latents)


def compiled_latents(shift: Tensor, scale: Tensor) -> Latents | None:
    """Return the compiled function by which `drawn_latents` draws, or None where PyTorch does."""
    compiled = FAST_LATENTS.get(0)
    return compiled and compiled.of(shift, scale)


def _by_pytorch(moments: Tensor, posterior: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    mean, log_variance = moments.float().chunk(2, dim=1)
    latent = mean + torch.exp(0.5 * log_variance) * posterior
    return (latent - shift.to(latent.device)) * scale.to(latent.device)


def _is_for_compiled(moments: Tensor, posterior: Tensor) -> bool:
    return (
        (moments.device.type, moments.dtype, posterior.dtype) == ("cpu", torch.float16, torch.float32)
        and moments.is_contiguous()
        and posterior.is_contiguous()
        and not torch.compiler.is_compiling()
    )


class CompiledLatents(NamedTuple):
    """The function of `core.compiled_latents`, and its table of deviations by the bits of a float16."""

    fill_latents: Callable[..., None]
    deviations: NDArray[np.float32]  # [65536]

    def latents(self, moments: Tensor, posterior: Tensor, shift: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """Return ``out`` with the same as PyTorch's operations."""
        rows, channels, length = *posterior.shape[:2], math.prod(posterior.shape[2:])
        fill_latents, *inputs = self.of(shift, scale)
        fill_latents(
            moments.numpy().view(np.uint16).reshape(rows, 2 * channels, length),
            posterior.numpy().reshape(rows, channels, length),
            *inputs,
            out.numpy().reshape(rows, channels, length),
        )
        return out

    def of(self, shift: Tensor, scale: Tensor) -> Latents:
        """Return the function with what it takes for these numbers, which are [1, 1 or c, 1, 1]."""
        mean, factor = ((value.detach() if value.requires_grad else value).numpy() for value in (shift, scale))
        return Latents(self.fill_latents, self.deviations, mean.reshape(-1), factor.reshape(-1))


def load_latents() -> CompiledLatents:
    """Return the compiled function.

    Raises any exception of numba, or ArithmeticError where its latents differ from those of PyTorch.
    """
    halves = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.float16))
    compiled: Any = import_module("core.compiled_latents")
    draws = CompiledLatents(compiled.fill_latents, torch.exp(0.5 * halves.float()).numpy())
    if not _equals_pytorchs(draws):
        raise ArithmeticError("they differ from PyTorch's on this machine")
    return draws


FAST_LATENTS = Deferred("latents", load_latents, worth=2**24)  # PyTorch computes them in 0.03 seconds


def _equals_pytorchs(draws: CompiledLatents) -> bool:
    numbers = np.random.Generator(np.random.Philox(0))
    moments = torch.from_numpy(numbers.normal(0, 5, (64, 6, 33, 7)).astype(np.float16))
    posterior = torch.from_numpy(numbers.normal(0, 1, (64, 3, 33, 7)).astype(np.float32))
    shift, scale = torch.tensor([0.1, -0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.18215]).view(1, 1, 1, 1)
    inputs = (moments, posterior, shift, scale)
    return torch.equal(draws.latents(*inputs, torch.empty_like(posterior)), _by_pytorch(*inputs))
