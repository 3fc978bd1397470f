"""The variance of the reverse step: what the network's output says of it."""

from typing import Protocol

import torch
from torch import Tensor


class Variance(Protocol):
    """Chooses log sigma_t^2 of p(x_{t-1} | x_t)."""

    learned: bool

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Network output -> (noise prediction [B, c, h, w], variance logits of that shape or None)."""
        ...

    def log_variance(self, logits: Tensor | None, log_beta_tilde: Tensor, log_beta: Tensor, t: Tensor) -> Tensor:
        """Logits, the two bounds [B, 1, 1, 1] and t [B] -> log-variance that broadcasts with x_t."""
        ...


class LearnedRangeVariance:
    """Interpolation between the bounds beta~_t and beta_t (Nichol & Dhariwal 2021, equation 15).

    The logit v in [-1, 1] becomes the fraction (v + 1) / 2; the network is free to leave that range.
    """

    learned = True

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """[B, 2c, h, w] -> noise and logits. ValueError where the network has other output channels."""
        if output.shape[1] != 2 * channels:
            raise ValueError(
                f"A learned variance needs {2 * channels} output channels, but the network has "
                f"{output.shape[1]}; set model.learn_sigma=true."
            )
        noise, logits = output.split(channels, dim=1)
        return noise, logits

    def log_variance(self, logits: Tensor | None, log_beta_tilde: Tensor, log_beta: Tensor, t: Tensor) -> Tensor:
        """[B, c, h, w] logits -> [B, c, h, w] log-variance."""
        assert logits is not None
        fraction = (logits + 1) / 2
        return fraction * log_beta + (1 - fraction) * log_beta_tilde


class _FixedVariance:
    learned = False

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """[B, c, h, w] -> itself and no logits. ValueError where the network predicts a variance."""
        if output.shape[1] != channels:
            raise ValueError(
                f"A fixed variance needs {channels} output channels, but the network has {output.shape[1]}; "
                "set model.learn_sigma=false."
            )
        return output, None


class FixedLargeVariance(_FixedVariance):
    """sigma_t^2 = beta_t (Ho et al. 2020, section 3.2)."""

    def log_variance(self, logits: Tensor | None, log_beta_tilde: Tensor, log_beta: Tensor, t: Tensor) -> Tensor:
        """[B, 1, 1, 1]: the upper bound; at the first step the lower one, which ADM takes for a better likelihood."""
        return torch.where(t.view(-1, 1, 1, 1) == 0, log_beta_tilde, log_beta)


class FixedSmallVariance(_FixedVariance):
    """sigma_t^2 = beta~_t (Ho et al. 2020, section 3.2)."""

    def log_variance(self, logits: Tensor | None, log_beta_tilde: Tensor, log_beta: Tensor, t: Tensor) -> Tensor:
        """[B, 1, 1, 1]: the lower bound."""
        return log_beta_tilde
