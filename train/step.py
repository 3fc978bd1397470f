"""Define one training step, a pure function of the batch and the state without a device read."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from core.batch import Batch, Condition
from diffusion.objective import LOSS, Objective, corrupt
from runtime.protocol import AT_LOG_STEPS, Devices, Metrics, Runtime, Step
from train.alignment import REPA
from train.ema import Averages
from train.guards import SpikeGuard

SUM, COUNT = "/sum", "/count"  # endings of two metrics whose quotient is one mean
TOTAL = "/total"  # ending of a metric that is summed over the interval
Embed = Callable[[Condition], Condition]


def as_it_is(condition: Condition) -> Condition:
    """Return the condition, which no frozen network encodes."""
    return condition


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Averages,
    objective: Objective,
    runtime: Runtime,
    max_grad_norm: float | None = None,
    guard: SpikeGuard | None = None,
    alignment: REPA | None = None,
    embedded: Embed = as_it_is,
) -> Step:
    """Return the step over a device batch in equal micro-batches, which returns scalars [] float32.

    The runtime has prepared ``model`` and ``optimizer``. Gradients are cleared at the end, so that no runtime keeps
    them as outputs of the step. If ``max_grad_norm`` is None, the norm is measured and not clipped. ``guard`` skips
    steps whose gradient norm is an outlier; None skips none. With ``alignment``, the model has its head. ``embedded``
    encodes the condition by frozen networks.
    """

    def losses(batch: Batch) -> Metrics:
        found = sample_losses(model, batch, objective, runtime, alignment, embedded)
        means = {name: values.mean() for name, values in found.items()}
        return {**means, **by_quarter(found[LOSS].detach(), objective.level(batch.t))}

    def step(micro_batches: Sequence[Batch], at_log_step: bool = True) -> Metrics:
        parts: list[Metrics] = []
        for number, batch in enumerate(micro_batches, start=1):
            with runtime.micro_step(model, is_last=number == len(micro_batches)):
                means = losses(batch)
                runtime.backward(means[LOSS] / len(micro_batches))
                parts.append({name: value.detach() for name, value in means.items()})
        grad_norm = runtime.clip(model.parameters(), max_grad_norm)
        weights = [parameter.detach() for parameter in model.parameters()] if at_log_step else []
        before = [weight.clone() for weight in weights]
        skipped = {}
        if guard is not None:
            spike = guard.is_spike(grad_norm)
            optimizer.found_inf = spike  # type: ignore[attr-defined]  # PyTorch's name for "leave this step out"
            skipped = {f"skipped_steps{TOTAL}": spike}
        optimizer.step()
        ema.update()
        optimizer.zero_grad(set_to_none=True)
        norms = {"grad_norm": grad_norm}
        if at_log_step:
            norms["param_norm"] = runtime.norm(weights)
            norms["update_norm"] = runtime.norm([old.sub_(new) for new, old in zip(weights, before, strict=True)])
        return {**{name: _mean([part[name] for part in parts]) for name in parts[0]}, **norms, **skipped}

    return step


def sample_losses(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    runtime: Devices,
    alignment: REPA | None = None,
    embedded: Embed = as_it_is,
) -> dict[str, Tensor]:
    """Run the forward pass and return the losses [B] of a device batch, by name.

    With ``alignment``, ``loss`` has its loss too, and ``objective`` is the objective's alone.
    """
    x_t, condition = corrupt(objective, batch), embedded(batch.condition)
    with runtime.autocast():
        output = model(*objective.inputs(x_t, batch.t), condition)
    if alignment is None:
        return objective.losses(output, batch, x_t)
    prediction, projected = output
    found, aligned = objective.losses(prediction, batch, x_t), alignment.losses(projected, batch.targets)
    total = found[LOSS] + alignment.coefficient * aligned
    return {**found, LOSS: total, "objective": found[LOSS], "alignment": aligned}


def by_quarter(losses: Tensor, level: Tensor) -> Metrics:
    """Return sums [] and counts [] of losses [B], by the quarter of [0, 1] that contains their noise level [B].

    Sums, not means, because a quarter may have no sample and the means of several devices would need unequal weights.
    """
    found, quarters = {}, (4 * level).long().clamp(max=3)
    for quarter in range(4):
        inside = quarters == quarter
        found[f"loss_t_quarter_{quarter + 1}{SUM}"] = torch.where(inside, losses, 0.0).sum()
        found[f"loss_t_quarter_{quarter + 1}{COUNT}"] = inside.float().sum()
    return found


def _mean(values: list[Tensor]) -> Tensor:
    """Return the mean of scalars [] on the device."""
    return torch.stack(values).mean()


def summary(interval: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Return means over the steps of an interval, sums for ``/total``, and sum of ``/sum`` / sum of ``/count``.

    Those of `AT_LOG_STEPS` are the last step's. A mean over no samples is None.
    """
    line: dict[str, float | None] = {}
    for name, values in interval.items():
        if name.endswith(SUM):
            mean_of = name.removesuffix(SUM)
            count = math.fsum(interval[mean_of + COUNT])
            line[mean_of] = math.fsum(values) / count if count else None
        elif name.endswith(TOTAL):
            line[name.removesuffix(TOTAL)] = math.fsum(values)
        elif name in AT_LOG_STEPS:
            line[name] = values[-1]
        elif not name.endswith(COUNT):
            line[name] = math.fsum(values) / len(values)
    return line
