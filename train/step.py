"""One training step: a pure function of the batch and the state. It reads nothing back to the host."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.batch import Batch
from diffusion.losses import Losses, diffusion_losses
from diffusion.process import GaussianDiffusion
from runtime.protocol import Devices, Metrics, Runtime, Step
from train.ema import Averages
from train.guards import SpikeGuard
from train.summary import COUNT, SUM, TOTAL


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Averages,
    process: GaussianDiffusion,
    runtime: Runtime,
    max_grad_norm: float | None = None,
    guard: SpikeGuard | None = None,
) -> Step:
    """Return the step over a device batch in equal micro-batches, which gives scalars [] float32.

    ``model`` and ``optimizer`` are the runtime's prepared ones. Gradients are cleared at the end, so that no
    runtime keeps them as outputs of the step. ``max_grad_norm`` None measures the norm and clips nothing.
    ``guard`` leaves out steps with an outlying gradient; None none.
    """

    def losses(batch: Batch) -> Metrics:
        found = sample_losses(model, batch, process, runtime)
        means = {"loss": found.total.mean(), "mse": found.mse.mean(), "vlb": found.vlb.mean()}
        return {**means, **by_quarter(found.total.detach(), batch.t, process.num_steps)}

    def step(micro_batches: Sequence[Batch]) -> Metrics:
        parts: list[Metrics] = []
        for number, batch in enumerate(micro_batches, start=1):
            with runtime.micro_step(model, is_last=number == len(micro_batches)):
                means = losses(batch)
                runtime.backward(means["loss"] / len(micro_batches))
                parts.append({name: value.detach() for name, value in means.items()})
        grad_norm = runtime.clip(model.parameters(), max_grad_norm)
        weights = [parameter.detach() for parameter in model.parameters()]
        before = [weight.clone() for weight in weights]
        skipped = {}
        if guard is not None:
            spike = guard.is_spike(grad_norm)
            optimizer.found_inf = spike  # type: ignore[attr-defined]  # PyTorch's name for "leave this step out"
            skipped = {f"skipped_steps{TOTAL}": spike}
        optimizer.step()
        ema.update()
        optimizer.zero_grad(set_to_none=True)
        norms = {
            "grad_norm": grad_norm,
            "param_norm": runtime.norm(weights),
            "update_norm": runtime.norm([old.sub_(new) for new, old in zip(weights, before, strict=True)]),
        }
        return {**{name: _mean([part[name] for part in parts]) for name in parts[0]}, **norms, **skipped}

    return step


def sample_losses(model: nn.Module, batch: Batch, process: GaussianDiffusion, runtime: Devices) -> Losses:
    """The forward pass: losses [B] of a device batch."""
    x_t = process.q_sample(batch.x_0, batch.t, batch.noise)
    with runtime.autocast():
        output = model(x_t, batch.t, batch.condition)
    return diffusion_losses(process, output, batch.x_0, x_t, batch.t, batch.noise)


def by_quarter(losses: Tensor, t: Tensor, num_steps: int) -> Metrics:
    """Sums [] and counts [] of losses [B] whose t [B] is in the first, second, third, last quarter of the steps.

    Not means: a quarter may have no sample, and means of several devices would have unequal weights.
    """
    found = {}
    for quarter in range(4):
        inside = t * 4 // num_steps == quarter
        found[f"loss_t_quarter_{quarter + 1}{SUM}"] = torch.where(inside, losses, 0.0).sum()
        found[f"loss_t_quarter_{quarter + 1}{COUNT}"] = inside.float().sum()
    return found


def _mean(values: list[Tensor]) -> Tensor:
    """Of scalars [] on the device."""
    return torch.stack(values).mean()
