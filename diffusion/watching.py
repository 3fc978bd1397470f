"""Watch a sampler at work: after each call of the network, the x_0 that its output implies can be computed.

Nothing that a sampler computes changes. A sampler that nobody watches calls its denoiser directly.
"""

from collections.abc import Callable

from torch import Tensor

from core.batch import Condition, Denoiser
from diffusion.objective import Objective

Watcher = Callable[[Callable[[], Tensor]], None]  # takes a function that computes x_0, [B, c, h, w] float32


class Watched:
    """A denoiser that calls a watcher after each of its own calls.

    ``objective`` is the one that the network was trained with, not a respaced process. An exception of the watcher
    ends the sampling.
    """

    def __init__(self, denoiser: Denoiser, objective: Objective, watcher: Watcher) -> None:
        self.denoiser, self.objective, self.watcher = denoiser, objective, watcher

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the denoiser's output for the network's inputs x_t [B, c, h, w] and t [B]."""
        output = self.denoiser(x_t, t, condition)
        self.watcher(lambda: self.objective.prediction(output, *self.objective.from_inputs(x_t, t)).x_0)
        return output
