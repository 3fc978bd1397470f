"""Define the interface of objectives: how data are corrupted, what the network predicts, and what is minimized.

Time runs with the noise: x_t = alpha x_0 + sigma noise is data at the smallest t and noise at the largest. An objective
is a module only so that its tables move with `.to(device)`; it has no parameters and no state.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from core.batch import Batch, Condition, Denoiser
from core.draws import Times

LOSS = "loss"  # the name of the loss that is minimized


class Prediction(NamedTuple):
    """The x_0, noise and variance that a network's output implies."""

    x_0: Tensor  # [B, c, h, w] float32
    noise: Tensor  # [B, c, h, w] float32
    log_variance: Tensor | None  # of the reverse step, broadcasts to [B, c, h, w]; None where the objective has none


class LatentFacts(NamedTuple):
    """Facts on the latents that a run trains on, from which settings of an objective may follow."""

    dimension: int  # c h w
    std: float  # of all values of x_0 together, as the network sees them


class Objective(nn.Module):
    """One way to train a denoiser. A new one needs a class, a YAML in ``conf/diffusion`` and a test."""

    name: ClassVar[str]  # the option of ``diffusion=``
    outputs_per_channel: int  # of the network, for each channel of the latent; the network is built from it
    times: Times  # how t is drawn in training
    reversed_time: bool = False  # whether the network sees a time that runs from noise to data

    @classmethod
    def settled(cls, settings: Mapping[str, Any], latents: LatentFacts) -> dict[str, Any]:
        """Return the settings of this class's config, with those filled in that follow from the latents."""
        return dict(settings)

    def facts(self) -> dict[str, str | float]:
        """Return the name and the settings that records of evaluations have."""
        return {"name": self.name}

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of x_t = alpha x_0 + sigma noise at t [B]: [B, 1, 1, 1] float32 each."""
        raise NotImplementedError

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's inputs for x_t [B, c, h, w] and t [B]: tensors of these shapes."""
        raise NotImplementedError

    def from_inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the x_t and the t whose `inputs` these are, for views of a sampler at work."""
        raise NotImplementedError

    def time_range(self) -> tuple[float, float]:
        """Return the least and the greatest t that there are."""
        raise NotImplementedError

    def seen(self, t: float) -> float:
        """Return the t that the network sees at t, as `inputs` gives it."""
        return self.inputs(torch.zeros(1, 1, 1, 1), torch.tensor([t], dtype=torch.float32))[1].item()

    def losses(self, output: Tensor, batch: Batch, x_t: Tensor) -> dict[str, Tensor]:
        """Return losses by name, [B] float32 each, of the network's output at x_t. `LOSS` is minimized, all are logged.

        The names are those of ``metrics.jsonl`` and the same at every step.
        """
        raise NotImplementedError

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Return what the output [B, outputs_per_channel c, h, w] of a network at x_t implies, in float32."""
        raise NotImplementedError

    def level(self, t: Tensor) -> Tensor:
        """Return how far t [B] is from data (0) to noise (1): [B] float32, for the loss by quarters."""
        raise NotImplementedError


def corrupt(objective: Objective, batch: Batch) -> Tensor:
    """Return x_t of a batch: [B, c, h, w]."""
    alpha, sigma = objective.alpha_sigma(batch.t)
    return alpha * batch.x_0 + sigma * batch.noise


def predict(network: Denoiser, objective: Objective, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
    """Call the network and return what its output implies at x_t [B, c, h, w] and t [B]."""
    return objective.prediction(network(*objective.inputs(x_t, t), condition), x_t, t)


def named(part: object) -> str:
    """Return the name of a part with its settings, such as "min_snr(gamma=5.0)"."""
    name = getattr(part, "name", type(part).__name__)
    settings = ", ".join(f"{key}={value}" for key, value in vars(part).items())
    return f"{name}({settings})" if settings else name


def mean_per_sample(values: Tensor) -> Tensor:
    """Return the mean over all but the first dimension: [B, ...] -> [B]."""
    return values.flatten(1).mean(dim=1)
