"""Guidance: denoisers that wrap another, and state the cost of a call."""

import math
from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.objective import Objective

Channels = int | Literal["all"]
Null = Callable[[Condition], Condition]  # the dropped condition, of as many rows on the same device


Cost = Callable[[Denoiser], int]  # multiply-adds of one call of a network for an image


class Guided(Denoiser, Protocol):
    """A guided denoiser. Made by a class that takes denoiser, null, latent_channels, objective and its settings."""

    name: ClassVar[str]  # in records
    needs_null: ClassVar[bool]  # whether the network must have been trained with the null condition

    def cost(self, cost_of: Cost) -> int:
        """Return the multiply-adds of one call for an image, where ``cost_of`` gives those of a network."""
        ...


class Unguided:
    """No guidance: the denoiser itself, at half the cost of classifier-free guidance of scale 1."""

    name: ClassVar[str] = "unguided"
    needs_null: ClassVar[bool] = False

    def __init__(
        self, denoiser: Denoiser, null: Null, latent_channels: int, objective: Objective | None = None
    ) -> None:
        self.denoiser = denoiser

    def cost(self, cost_of: Cost) -> int:
        """Return the cost of one call of the network."""
        return cost_of(self.denoiser)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the denoiser's output."""
        return self.denoiser(x_t, t, condition)


class ClassifierFreeGuidance:
    """Classifier-free guidance (paper, section 3.1): eps = eps_null + scale (eps_condition - eps_null).

    ``channels`` is how many of the noise prediction's channels are guided: "all", or 3 as in the released
    code, whose published results guide three of four latent channels. Variance logits are the conditional
    ones. Both halves go through the network in one batch. Guidance acts for t in [``t_min``, ``t_max``] (Kynkaanniemi
    et al. 2024; see `Interval`); outside, the conditional prediction stands.

    Raises ValueError for a negative scale, too many channels, or an interval that is empty or beyond the objective's.
    """

    name: ClassVar[str] = "ClassifierFreeGuidance"
    needs_null: ClassVar[bool] = True

    def __init__(
        self,
        denoiser: Denoiser,
        null: Null,
        latent_channels: int,
        scale: float = 1.0,
        channels: Channels = "all",
        t_min: float = 0,
        t_max: float | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.null = null
        self.num_guided = _num_guided(scale, channels, latent_channels)
        self.interval = Interval(scale, t_min, t_max, objective)

    def cost(self, cost_of: Cost) -> int:
        """Return the cost of two calls of the network, also outside the interval."""
        return 2 * cost_of(self.denoiser)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the guided output, [B, k c, h, w] as the denoiser's, of x_t [B, c, h, w] at t [B]."""
        null = self.null(condition)
        twice = {name: torch.cat([value, null[name]]) for name, value in condition.items()}
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), twice)
        conditional, unconditional = both.float().chunk(2)
        return _extrapolated(conditional, unconditional, self.interval.scale_at(t), self.num_guided)


class Autoguidance:
    """Guidance by a worse version of the model: eps = eps_guide + scale (eps - eps_guide), both with the condition.

    Source: Karras et al. 2024, "Guiding a diffusion model with a bad version of itself", equation 2.
    ``guide`` is another denoiser of the same latents: a smaller model, or one trained for less. The interval and
    the refusals are those of `ClassifierFreeGuidance`.
    """

    name: ClassVar[str] = "Autoguidance"
    needs_null: ClassVar[bool] = False

    def __init__(
        self,
        denoiser: Denoiser,
        null: Null,
        latent_channels: int,
        guide: Denoiser,
        scale: float = 1.0,
        channels: Channels = "all",
        t_min: float = 0,
        t_max: float | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.guide = guide
        self.num_guided = _num_guided(scale, channels, latent_channels)
        self.interval = Interval(scale, t_min, t_max, objective)

    def cost(self, cost_of: Cost) -> int:
        """Return the cost of a call of each network."""
        return cost_of(self.denoiser) + cost_of(self.guide)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the guided output, [B, k c, h, w] as the denoiser's, of x_t [B, c, h, w] at t [B]."""
        good = self.denoiser(x_t, t, condition).float()
        bad = self.guide(x_t, t, condition).float()
        return _extrapolated(good, bad, self.interval.scale_at(t), self.num_guided)


class Interval:
    """The times at which guidance acts: from ``t_min`` to ``t_max`` of the objective, or to the noisiest.

    Guidance sees the network's t, which an objective may scale or reverse, so both ends are converted to that. Without
    an objective they are the network's own.
    """

    def __init__(self, scale: float, t_min: float, t_max: float | None, objective: Objective | None) -> None:
        self.scale = scale
        if t_max is not None and t_max < t_min:
            raise ValueError(f"guidance.t_max {t_max} is below guidance.t_min {t_min}; no step would be guided.")
        self.low, self.high = float(t_min), math.inf if t_max is None else float(t_max)
        if objective is None:
            return
        least, greatest = objective.time_range()
        ends = {"t_min": t_min, "t_max": greatest if t_max is None else t_max}
        for name, t in ends.items():
            if not least <= t <= greatest:
                raise ValueError(
                    f"guidance.{name} is {t}, but the times of diffusion={objective.name} are from {least:g} (data) to "
                    f"{greatest:g} (noise); set it between them."
                )
        self.low, self.high = sorted(map(objective.seen, ends.values()))

    def scale_at(self, t: Tensor) -> Tensor:
        """Return the scale inside the interval and 1 outside: [B, 1, 1, 1], chosen on the device."""
        return torch.where((t >= self.low) & (t <= self.high), self.scale, 1.0).view(-1, 1, 1, 1)


def _num_guided(scale: float, channels: Channels, latent_channels: int) -> int:
    if scale < 0:
        raise ValueError(f"guidance.scale is {scale}, but it must be at least 0; 1 means no guidance.")
    guided = latent_channels if channels == "all" else channels
    if not 1 <= guided <= latent_channels:
        raise ValueError(
            f"guidance.channels is {channels}, but the latent has {latent_channels} channels; "
            "use a smaller number or 'all'."
        )
    return guided


def _extrapolated(good: Tensor, bad: Tensor, scale: Tensor, num_guided: int) -> Tensor:
    """Move the first ``num_guided`` channels from bad through good by ``scale`` [B, 1, 1, 1]; the rest is good's."""
    guided = bad[:, :num_guided] + scale * (good[:, :num_guided] - bad[:, :num_guided])
    return torch.cat([guided, good[:, num_guided:]], dim=1)
