"""Leaves out steps whose gradient is an outlier, without asking the host."""

import math
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from runtime.protocol import Devices
from train.state import TrainState

WINDOW = 1000  # gradient norms that the median is of: those of the last log lines
MIN_NORMS = 20  # without so many, no step is an outlier


class SpikeGuard(nn.Module):
    """Skips a step whose gradient norm exceeds ``factor`` times the median of those before.

    The median is taken at log steps, where norms reach the host anyway, and holds until the next. A module only so
    that the threshold goes to the devices as buffers do. A skipped step leaves weights and optimizer alone.

    Raises ValueError for an optimizer that cannot skip, or a factor of 1 or less.
    """

    threshold: Tensor  # [] float32; infinite: nothing is skipped

    def __init__(self, factor: float, optimizer: Any, runtime: Devices) -> None:
        super().__init__()
        if factor <= 1:
            raise ValueError(f"skip_grad_norm is {factor}, but it must exceed 1, the median itself; 10 is usual.")
        # The protocol of PyTorch's own GradScaler.
        if not hasattr(optimizer, "found_inf") and not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError(
                f"skip_grad_norm is {factor}, but {type(optimizer).__name__} cannot skip a step; use "
                "train/optimizer=adamw, or skip_grad_norm=null."
            )
        self._factor = factor
        self._runtime = runtime
        self._set(math.inf)

    def start(self, state: TrainState) -> None:
        """Go on from the norms of a checkpoint."""
        norms = state.recent_grad_norms
        self._set(self._factor * median(norms) if len(norms) >= MIN_NORMS else math.inf)

    def observe(self, state: TrainState) -> None:
        """At a log step: take in the norms of its interval."""
        state.recent_grad_norms = [*state.recent_grad_norms, *state.interval["grad_norm"]][-WINDOW:]
        self.start(state)

    def is_spike(self, grad_norm: Tensor) -> Tensor:
        """1.0 where the step is to be skipped, else 0.0: [] float32 on the device."""
        return (grad_norm > self.threshold).float()

    def _set(self, value: float) -> None:
        self.register_buffer("threshold", torch.tensor(value, dtype=torch.float32), persistent=False)
        self._runtime.place(self)
