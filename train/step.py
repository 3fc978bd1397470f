"""One training step: a pure function of the batch and the state. It reads nothing back to the host."""

import torch
from torch import Tensor, nn

from diffusion.batch import Batch
from diffusion.losses import diffusion_losses
from diffusion.process import GaussianDiffusion
from runtime.protocol import Runtime, Step
from train.ema import EMA


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    process: GaussianDiffusion,
    runtime: Runtime,
    max_grad_norm: float | None = None,
) -> Step:
    """The step over a device batch {latent, label, t, noise}; returns scalars [] float32 on the device.

    ``model`` and ``optimizer`` are the runtime's prepared ones. Gradients are cleared at the end, so that no
    runtime keeps them as outputs of the step. ``max_grad_norm`` None measures the norm and clips nothing.
    """
    clip_at = float("inf") if max_grad_norm is None else max_grad_norm

    def step(batch: Batch) -> dict[str, Tensor]:
        x_0, t, noise = batch["latent"], batch["t"], batch["noise"]
        x_t = process.q_sample(x_0, t, noise)
        with runtime.autocast():
            output = model(x_t, t, batch["label"])
        losses = diffusion_losses(process, output, x_0, x_t, t, noise)
        loss = losses.total.mean()
        runtime.backward(loss)
        grad_norm = runtime.clip(model.parameters(), clip_at)
        optimizer.step()
        ema.update()
        optimizer.zero_grad(set_to_none=True)
        return {
            "loss": loss.detach(),
            "mse": losses.mse.detach().mean(),
            "vlb": losses.vlb.detach().mean(),
            "grad_norm": grad_norm,
        }

    return step
