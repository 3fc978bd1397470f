"""Define moving averages of the weights over training, behind one interface.

The weight that an average gives to the newest weights may depend on the step. It is then computed on the device from a
step count that is stored there, so that the compiled program is the same at every step.
"""

import copy
import math
from collections.abc import Mapping
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

MAIN = "ema"  # the average that training samples from and measures


class Average:
    """One average of the weights, held in float32 by ``module``, a copy of the model.

    ``step_weight`` is the weight of the newest weights in an update; the average so far gets the rest.
    """

    warms_up: ClassVar[bool] = False  # whether it forgets the initial weights faster in its first updates

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        # A buffer, so that the runtime moves it with the module; not persistent, since a checkpoint has the step.
        self.module.register_buffer("_num_updates", torch.zeros(()), persistent=False)

    def start_at(self, step: int) -> None:
        """Continue after ``step`` updates. Called on the CPU, before the runtime prepares the module."""
        self.module.register_buffer("_num_updates", torch.tensor(float(step)), persistent=False)

    def step_weight(self, num_updates: Tensor) -> Tensor | float:
        """Return the weight, a scalar in [0, 1], of the weights at update ``num_updates`` [] float32, from 1."""
        raise NotImplementedError

    def initial_share(self, steps: int) -> float:
        """Return the share, in [0, 1], that the initial weights have in the average after ``steps`` steps."""
        updates = torch.arange(1, steps + 1, dtype=torch.float64)
        share = self.step_weight(updates)
        kept = 1.0 - torch.as_tensor(share, dtype=torch.float64).expand(steps)
        return float(kept.prod()) if steps else 1.0

    @torch.no_grad()
    def update(self) -> None:
        """Set average = average + step_weight x (weights - average), with the weights after this step."""
        # Looked up at each update: a runtime may have replaced the parameters of both modules.
        averages: list[Tensor] = list(self.module.parameters())
        trained = dict(self._model.named_parameters())  # among them a head's, which has no average
        weights: list[Tensor] = [trained[name] for name, _ in self.module.named_parameters()]
        num_updates = cast(Tensor, self.module._num_updates).add_(1)
        share = self.step_weight(num_updates)
        if isinstance(share, float):
            torch._foreach_lerp_(averages, weights, share)
            return
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, share)


class ConstantAverage(Average):
    """An average with constant decay: average = decay x average + (1 - decay) x weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = require_decay(decay)

    def step_weight(self, num_updates: Tensor) -> float:
        """Return 1 - decay, the same at every step."""
        return 1.0 - self.decay


class WarmedUpAverage(Average):
    """An average with decay min(decay, (1 + n) / (10 + n)) at update n, which soon forgets the initial weights."""

    warms_up: ClassVar[bool] = True

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = require_decay(decay)

    def step_weight(self, num_updates: Tensor) -> Tensor:
        """Return max(9 / (10 + n), 1 - decay) for update n."""
        return (9.0 / (10.0 + num_updates)).clamp(min=1.0 - self.decay)


class PowerAverage(Average):
    """The power-function average of Karras et al. 2024, section 3.1, in which the weights of step i count as i^gamma.

    The update at step t keeps (1 - 1/t)^(gamma + 1) of the average (equation 4), so the first one drops the initial
    weights.
    """

    def __init__(self, model: nn.Module, relative_std: float) -> None:
        super().__init__(model)
        self.gamma = gamma_of(relative_std)

    def step_weight(self, num_updates: Tensor) -> Tensor:
        """Return 1 - (1 - 1/t)^(gamma + 1), computed without the cancellation of float32 at late steps."""
        return -torch.expm1((self.gamma + 1.0) * torch.log1p(-1.0 / num_updates))


class Averages:
    """The averages of one run, by their name in a checkpoint and in ``weights=``; the first is `MAIN`."""

    def __init__(self, by_name: Mapping[str, Average]) -> None:
        assert next(iter(by_name)) == MAIN
        self.by_name = dict(by_name)

    @property
    def module(self) -> nn.Module:
        """Return the average that training samples from and measures."""
        return self.by_name[MAIN].module

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the modules of all averages, by name."""
        return {name: average.module for name, average in self.by_name.items()}

    def start_at(self, step: int) -> None:
        """Continue after ``step`` updates, before the runtime prepares the modules."""
        for average in self.by_name.values():
            average.start_at(step)

    def update(self) -> None:
        """Update each average with the weights after the optimizer's step."""
        for average in self.by_name.values():
            average.update()


MOST_INITIAL_SHARE = 0.05  # above this share of untrained weights, an average is reported
_SHORT_RUN = 0.99  # decay of train/ema=short_run


def initial_share_note(average: Average, name: str, steps: int) -> str | None:
    """Return a sentence if untrained weights still have a large share in an average after ``steps`` steps, or None."""
    if (share := average.initial_share(steps)) <= MOST_INITIAL_SHARE:
        return None
    others = [] if average.warms_up else ["train/ema=warmed_up"]
    others += ["short_run"] if others and _SHORT_RUN**steps <= MOST_INITIAL_SHARE else []
    way_out = f"with {' (or '.join(others)}{')' * (len(others) - 1)}, or longer" if others else "longer"
    return (
        f"after {steps} steps, {100 * share:.0f}% of the average {name!r} are still the untrained weights, and its "
        f"samples are noise to that extent; train {way_out}. weights=model are the trained ones."
    )


def constant(model: nn.Module, decay: float = 0.9999) -> Averages:
    """Return one average with constant decay (paper, section 4: 0.9999)."""
    return Averages({MAIN: ConstantAverage(model, decay)})


def warmed_up(model: nn.Module, decay: float = 0.9999) -> Averages:
    """Return one average for runs with fewer steps than the memory of its decay, 1 / (1 - decay)."""
    return Averages({MAIN: WarmedUpAverage(model, decay)})


def several(model: nn.Module, decays: list[float]) -> Averages:
    """Return averages of several constant decays: the first is ``ema``, the others are ``ema_DECAY``.

    Raises ValueError where there is no decay, or where two are equal.
    """
    if not decays or len(set(decays)) < len(decays):
        raise ValueError(f"ema.decays is {decays}, but it must be one or more different decays.")
    names = [MAIN, *(f"{MAIN}_{decay:g}" for decay in decays[1:])]
    return Averages({name: ConstantAverage(model, decay) for name, decay in zip(names, decays, strict=True)})


def power(model: nn.Module, relative_stds: list[float]) -> Averages:
    """Return power-function averages of widths relative to the run: the first is ``ema``, the others ``ema_WIDTH``.

    `train.posthoc` reconstructs any other width from two of them after training.
    """
    if not relative_stds or len(set(relative_stds)) < len(relative_stds):
        raise ValueError(f"ema.relative_stds is {relative_stds}, but it must be one or more different widths.")
    names = [MAIN, *(f"{MAIN}_{width:g}" for width in relative_stds[1:])]
    return Averages({name: PowerAverage(model, width) for name, width in zip(names, relative_stds, strict=True)})


def require_decay(decay: float) -> float:
    """Return the decay. Raises ValueError where it is not in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(f"ema.decay is {decay}, but it must be in [0, 1); the paper uses 0.9999.")
    return decay


def relative_std_of(gamma: float) -> float:
    """Return the width of the profile tau^gamma on [0, 1], its standard deviation (Karras et al. 2024, section 3.1)."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_of(relative_std: float) -> float:
    """Return the exponent gamma of a width, the largest root of gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s.

    Here s = width^-2. Raises ValueError outside (0, 0.28): wider profiles would give early steps more weight than late
    ones.
    """
    if not 0 < relative_std < 0.28:
        raise ValueError(f"The width {relative_std} of an average is not in (0, 0.28); Karras et al. use 0.05 and 0.1.")
    inverse_variance = relative_std**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse_variance, 12.0 - inverse_variance])
    return float(roots.real.max())
