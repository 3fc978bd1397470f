"""Averages of the weights over training, behind one interface.

A step's weight in an average may depend on the step. It is then computed on the device from a count that lies
there, so that no runtime sees another program at another step.
"""

import copy
import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

MAIN = "ema"  # the average that training samples from and measures


class Average:
    """One average: ``module`` is a copy of the model that holds it, in float32.

    ``step_weight`` says what weight the newest weights get; the rest is the average so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        # Lies where the runtime puts the module; no part of its weights on disk, since the step is in a checkpoint.
        self.module.register_buffer("_num_updates", torch.zeros(()), persistent=False)

    def start_at(self, step: int) -> None:
        """Continue after ``step`` updates. Called on the host, before the runtime prepares the module."""
        self.module.register_buffer("_num_updates", torch.tensor(float(step)), persistent=False)

    def step_weight(self, num_updates: Tensor) -> Tensor | float:
        """Of the weights after update number ``num_updates`` [] float32, which counts from 1: a scalar in [0, 1]."""
        raise NotImplementedError

    def initial_share(self, steps: int) -> float:
        """Return the share of the weights before the first step in the average after so many steps, in [0, 1]."""
        updates = torch.arange(1, steps + 1, dtype=torch.float64)
        share = self.step_weight(updates)
        kept = 1.0 - torch.as_tensor(share, dtype=torch.float64).expand(steps)
        return float(kept.prod()) if steps else 1.0

    @torch.no_grad()
    def update(self) -> None:
        """Set average = average + step_weight x (weights - average), with the weights after this step."""
        # Looked up each time: a runtime may have put other parameters into both modules.
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(self._model.parameters())
        num_updates = cast(Tensor, self.module._num_updates).add_(1)
        share = self.step_weight(num_updates)
        if isinstance(share, float):
            torch._foreach_lerp_(averages, weights, share)
            return
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, share)


class ConstantAverage(Average):
    """Constant decay: average = decay x average + (1 - decay) x weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = require_decay(decay)

    def step_weight(self, num_updates: Tensor) -> float:
        """The same at every step."""
        return 1.0 - self.decay


class WarmedUpAverage(Average):
    """Decay min(decay, (1 + n) / (10 + n)) at update n, which forgets a short run's first weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = require_decay(decay)

    def step_weight(self, num_updates: Tensor) -> Tensor:
        """9 / (10 + n), until that is less than 1 - decay."""
        return (9.0 / (10.0 + num_updates)).clamp(min=1.0 - self.decay)


class PowerAverage(Average):
    """The power-function average of Karras et al. 2024, section 3.1: weights of step i count as i^gamma.

    Its update at step t keeps (1 - 1/t)^(gamma + 1) of the average (equation 4), so the first weights go at once.
    """

    def __init__(self, model: nn.Module, relative_std: float) -> None:
        super().__init__(model)
        self.gamma = gamma_of(relative_std)

    def step_weight(self, num_updates: Tensor) -> Tensor:
        """1 - (1 - 1/t)^(gamma + 1), without the cancellation that float32 has at late steps."""
        return -torch.expm1((self.gamma + 1.0) * torch.log1p(-1.0 / num_updates))


class Averages:
    """Those of one run, by the name under which a checkpoint and ``weights=`` know them; the first is `MAIN`."""

    def __init__(self, by_name: Mapping[str, Average]) -> None:
        assert next(iter(by_name)) == MAIN
        self.by_name = dict(by_name)

    @property
    def module(self) -> nn.Module:
        """The average that is sampled from and measured during training."""
        return self.by_name[MAIN].module

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All of them."""
        return {name: average.module for name, average in self.by_name.items()}

    def start_at(self, step: int) -> None:
        """Continue after ``step`` updates, before the runtime prepares the modules."""
        for average in self.by_name.values():
            average.start_at(step)

    def update(self) -> None:
        """After the optimizer's step."""
        for average in self.by_name.values():
            average.update()


MOST_INITIAL_SHARE = 0.05  # of untrained weights in an average, above which it is no average of trained ones
_SHORT_RUN = 0.99  # decay of train/ema=short_run


def initial_share_note(average: Average, name: str, steps: int) -> str | None:
    """Return a sentence where an average is still much of the untrained weights after so many steps; else None."""
    if (share := average.initial_share(steps)) <= MOST_INITIAL_SHARE:
        return None
    others = [] if isinstance(average, WarmedUpAverage) else ["train/ema=warmed_up"]
    others += ["short_run"] if others and _SHORT_RUN**steps <= MOST_INITIAL_SHARE else []
    way_out = f"with {' (or '.join(others)}{')' * (len(others) - 1)}, or longer" if others else "longer"
    return (
        f"after {steps} steps, {100 * share:.0f}% of the average {name!r} are still the untrained weights, and its "
        f"samples are noise to that extent; train {way_out}. weights=model are the trained ones."
    )


def constant(model: nn.Module, decay: float = 0.9999) -> Averages:
    """One average of constant decay (paper, section 4: 0.9999)."""
    return Averages({MAIN: ConstantAverage(model, decay)})


def warmed_up(model: nn.Module, decay: float = 0.9999) -> Averages:
    """One average for runs of fewer steps than its decay remembers."""
    return Averages({MAIN: WarmedUpAverage(model, decay)})


def several(model: nn.Module, decays: list[float]) -> Averages:
    """Constant decays at once: ``ema`` is the first, the others are ``ema_DECAY``. Raises ValueError for none."""
    if not decays or len(set(decays)) < len(decays):
        raise ValueError(f"ema.decays is {decays}, but it must be one or more different decays.")
    names = [MAIN, *(f"{MAIN}_{decay:g}" for decay in decays[1:])]
    return Averages({name: ConstantAverage(model, decay) for name, decay in zip(names, decays, strict=True)})


def power(model: nn.Module, relative_stds: list[float]) -> Averages:
    """Power-function averages of these widths, relative to the run: ``ema`` is the first, the others ``ema_WIDTH``.

    Any other width is made of two of them after training (`train.posthoc`).
    """
    if not relative_stds or len(set(relative_stds)) < len(relative_stds):
        raise ValueError(f"ema.relative_stds is {relative_stds}, but it must be one or more different widths.")
    names = [MAIN, *(f"{MAIN}_{width:g}" for width in relative_stds[1:])]
    return Averages({name: PowerAverage(model, width) for name, width in zip(names, relative_stds, strict=True)})


def require_decay(decay: float) -> float:
    """The decay, if it is in [0, 1); else raises ValueError."""
    if not 0 <= decay < 1:
        raise ValueError(f"ema.decay is {decay}, but it must be in [0, 1); the paper uses 0.9999.")
    return decay


def relative_std_of(gamma: float) -> float:
    """Width of the profile tau^gamma on [0, 1], its standard deviation: Karras et al. 2024, section 3.1."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_of(relative_std: float) -> float:
    """The exponent of a width. Raises ValueError outside (0, 0.28): wider profiles would grow into the past.

    The largest root of gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s with s = width^-2.
    """
    if not 0 < relative_std < 0.28:
        raise ValueError(f"The width {relative_std} of an average is not in (0, 0.28); Karras et al. use 0.05 and 0.1.")
    inverse_variance = relative_std**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse_variance, 12.0 - inverse_variance])
    return float(roots.real.max())
