"""Skip steps whose gradient norm is an outlier, without a device read."""

import math
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from runtime.protocol import Runtime
from train.state import TrainState

WINDOW = 1000  # the most gradient norms, up to the last log line, that the median is computed over
MIN_NORMS = 20  # with fewer gradient norms, no step is skipped


class SpikeGuard(nn.Module):
    """Skips a step whose gradient norm exceeds ``factor`` times the median of earlier norms.

    The median is computed at log steps, where norms are fetched to the CPU anyway, and applies until the next log step.
    This is a module so that the runtime places the threshold like any buffer. A skipped step changes neither weights
    nor optimizer state.

    Raises ValueError where the optimizer cannot skip a step, or where the factor is 1 or less.
    """

    threshold: Tensor  # [] float32; infinity skips nothing

    def __init__(self, factor: float, optimizer: Any, runtime: Runtime) -> None:
        super().__init__()
        if factor <= 1:
            raise ValueError(f"skip_grad_norm is {factor}, but it must exceed 1, the median itself; 10 is usual.")
        # torch.amp.GradScaler asks optimizers to skip a step in the same way.
        if not hasattr(optimizer, "found_inf") and not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError(
                f"skip_grad_norm is {factor}, but {type(optimizer).__name__} cannot skip a step; use "
                "train/optimizer=adamw, or skip_grad_norm=null."
            )
        self._factor = factor
        self._runtime = runtime
        self.register_buffer("threshold", torch.tensor(math.inf), persistent=False)
        runtime.place(self)

    def start(self, state: TrainState) -> None:
        """Set the threshold from the norms of a checkpoint."""
        norms = state.recent_grad_norms
        self._set(self._factor * median(norms) if len(norms) >= MIN_NORMS else math.inf)

    def observe(self, state: TrainState) -> None:
        """Add the norms of the interval that ends at this log step, and set the threshold."""
        state.recent_grad_norms = [*state.recent_grad_norms, *state.interval["grad_norm"]][-WINDOW:]
        self.start(state)

    def is_spike(self, grad_norm: Tensor) -> Tensor:
        """Return 1.0 where the step is to be skipped, else 0.0, as [] float32 on the device."""
        return (grad_norm > self.threshold).float()

    def _set(self, value: float) -> None:
        self.threshold = self._runtime.assign(self.threshold, value)
