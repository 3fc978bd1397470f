"""Repeat the step at which a run diverged, and find the samples, modules and parameters that are not finite.

Everything goes through the runtime, as in training, so a dump of any runtime and sharding can be examined where it was
made. Nothing is written. Unlike training, values are read from the device after every step.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core.batch import Batch, mapped
from core.progress import ProgressBar
from diffusion.objective import LOSS, Objective
from runtime.protocol import Metrics, Runtime, Step
from train.alignment import REPA
from train.dump import DivergedError
from train.guards import SpikeGuard
from train.hooks import due
from train.state import TrainState
from train.step import Embed, as_it_is, sample_losses

MAX_NAMED = 20  # the most samples that the search sample by sample names
OUTPUT = "the network's output"


class FollowHook:
    """Follows a restored run to the step before the one that diverged, as `LogHook` does but without writing."""

    def __init__(
        self, every: int, last: int, runtime: Runtime, guard: SpikeGuard | None, progress: ProgressBar
    ) -> None:
        self._every, self._last = every, last
        self._runtime = runtime
        self._guard = guard
        self._progress = progress
        self._bar: Any = None
        self._stack = ExitStack()

    def start(self, state: TrainState) -> None:
        """Start the guard and show a progress bar."""
        if self._guard is not None:
            self._guard.start(state)
        self._bar = self._stack.enter_context(self._progress("replay", state.step, self._last, "step"))

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Raise DivergedError if this step, which was finite in the run, is not finite now."""
        self._bar.update(1)
        for name, (value,) in self._runtime.fetch([metrics]).items():
            state.interval.setdefault(name, []).append(value)
            if not math.isfinite(value):
                raise DivergedError(f"{name} is {value} in step {state.step} already", state.step, name, value)
        if due(state, self._every):
            if self._guard is not None:
                self._guard.observe(state)
            state.interval = {}

    def finish(self) -> None:
        """Close the bar."""
        self._stack.close()


@dataclass(frozen=True)
class Passes:
    """The results of a forward and a backward pass, the same on every process."""

    losses: NDArray[np.float64]  # [B] of the whole batch, in the order of positions
    activations: list[str]  # modules whose output is not finite, in the order in which they finish
    gradients: list[str]  # parameters whose gradient's norm is not finite, from the loss backwards


@dataclass(frozen=True)
class Findings:
    """The results of repeating the step that diverged."""

    metrics: dict[str, float]  # as training has them: loss, norms
    passes: Passes
    weights: list[str]  # parameters that are not finite after the update
    weights_before: list[str] = field(default_factory=list)  # and before the step
    samples: list[int] = field(default_factory=list)  # rows of the batch whose loss, or own gradient, is not finite

    @property
    def not_finite(self) -> dict[str, float]:
        """Return the metrics that are not finite; empty if the step is sound."""
        return {name: value for name, value in self.metrics.items() if not math.isfinite(value)}


class Replay:
    """Examines one step of a prepared run. Every process must call its methods.

    ``model`` and ``step`` are the runtime's; ``state`` is that before the step.
    """

    def __init__(
        self,
        model: nn.Module,
        state: TrainState,
        step: Step,
        objective: Objective,
        runtime: Runtime,
        alignment: REPA | None = None,
        embedded: Embed = as_it_is,
    ) -> None:
        self._model = model
        self._state = state
        self._step = step
        self._objective = objective
        self._runtime = runtime
        self._alignment = alignment
        self._embedded = embedded

    def examine(self, batch: Batch, whole: Batch, progress: ProgressBar) -> Findings:
        """Run the step with this process's rows ``batch``; ``whole`` is the batch of all processes."""
        weights_before = self._weights_not_finite()
        passes = self.passes(batch)
        samples: list[int] = np.flatnonzero(~np.isfinite(passes.losses)).tolist()
        if passes.gradients and not samples:
            samples = self._one_by_one(whole, len(batch.t), progress)
        metrics = self._fetch(self._step(self._on_device(batch)))
        return Findings(metrics, passes, self._weights_not_finite(), weights_before, samples)

    def _weights_not_finite(self) -> list[str]:
        norms = {name: self._runtime.norm([weight.detach()]) for name, weight in self._state.model.named_parameters()}
        return [name for name, norm in self._fetch(norms).items() if not math.isfinite(norm)]

    def passes(self, batch: Batch) -> Passes:
        """Run a forward and a backward pass and record what is not finite; the state does not change."""
        losses: list[Tensor] = []
        order: dict[str, Tensor] = {}

        def watched_passes(micro_batches: Sequence[Batch]) -> Metrics:
            for number, part in enumerate(micro_batches, start=1):
                with self._runtime.micro_step(self._model, is_last=number == len(micro_batches)):
                    with _watched(self._state.model, order):
                        found = self._losses(part)
                    self._runtime.backward(found[LOSS].mean() / len(micro_batches))
                    losses.append(found[LOSS].detach())
            gradients = [(name, weight.grad) for name, weight in self._state.model.named_parameters()]
            norms = {f"gradient {name}": self._runtime.norm([grad]) for name, grad in gradients if grad is not None}
            self._state.optimizer.zero_grad(set_to_none=True)
            return {**{f"output {name}": finite for name, finite in order.items()}, **norms}

        values = self._fetch(self._runtime.step(watched_passes)(self._on_device(batch)))
        mine = np.concatenate([self._runtime.rows(part).double().numpy() for part in losses])
        outputs = [name for name in order if values[f"output {name}"] < 1]  # a mean over processes
        bad = {name for name, value in values.items() if name.startswith("gradient ") and not math.isfinite(value)}
        gradients = [name for name in self._parameters_backwards(list(order)) if f"gradient {name}" in bad]
        return Passes(self._runtime.gather(mine), outputs, gradients)

    def _losses(self, part: Batch) -> dict[str, Tensor]:
        return sample_losses(self._model, part, self._objective, self._runtime, self._alignment, self._embedded)

    def _one_by_one(self, whole: Batch, rows: int, progress: ProgressBar) -> list[int]:
        """Return the rows whose own gradient is not finite; each fills a batch, which any runtime can split."""
        found: list[int] = []
        count = len(whole.t)
        with progress("each sample's gradient", 0, count, "img") as bar:
            for row in range(count):
                same = torch.full((rows,), row)
                if self.passes(mapped(whole, itemgetter(same))).gradients:
                    found.append(row)
                bar.update(1)
                if len(found) == MAX_NAMED:
                    break
        return found

    def _parameters_backwards(self, modules_in_order: list[str]) -> list[str]:
        """Return the names of parameters, starting with those of the module that finished last."""
        place = {name: number for number, name in enumerate(modules_in_order)}
        names = [name for name, _ in self._state.model.named_parameters()]
        return sorted(names, key=lambda name: -place.get(name.rpartition(".")[0], -1))

    def _on_device(self, batch: Batch) -> Sequence[Batch]:
        return next(iter(self._runtime.feed([batch])))

    def _fetch(self, metrics: Metrics) -> dict[str, float]:
        return {name: value for name, (value,) in self._runtime.fetch([metrics]).items()}


@contextmanager
def _watched(model: nn.Module, finite: dict[str, Tensor]) -> Iterator[None]:
    """Store in ``finite`` 1.0 or 0.0 [] on the device for each module's output, in the order in which they finish."""
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def note(_: nn.Module, __: Any, output: Any, name: str = name or OUTPUT) -> None:
                if isinstance(output, Tensor):
                    flag = torch.isfinite(output.detach()).all().float()
                    finite[name] = finite[name] * flag if name in finite else flag

            stack.callback(module.register_forward_hook(note).remove)
        yield
