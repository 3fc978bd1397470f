"""What the rest of the program asks of a network: the class behind ``conf/model/*.yaml``.

Only this room knows more of a network than this. A network takes one config, a dataclass that checks itself; the keys
of its section in ``conf/`` are the fields of that class.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn


class Network(nn.Module):
    """Denoiser over latents. It knows no schedule, no guidance and drops no condition."""

    config_class: ClassVar[type]  # of ``config``
    latent_shape: tuple[int, int, int]  # (c, h, w)
    out_channels: int  # of its output

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._built_as: Any = type(self)  # FSDP2 gives sharded modules classes of its own

    def twin(self) -> Self:
        """Return a new network of the same config: on the meta device, a network without memory."""
        twin: Self = self._built_as(self.config)
        return twin

    def forward(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """[B, c, h, w] float, [B] int64 or float, tensors by name with leading dimension B -> [B, c', h, w]."""
        raise NotImplementedError

    def initialize(self, seed: int) -> None:
        """Draw the weights anew from one generator with this seed. Nothing is drawn on the meta device."""
        raise NotImplementedError

    def units(self) -> Sequence[nn.Module]:
        """Return the parts that are compiled, recomputed and sharded one by one, wherever they are in the tree.

        Parts of one class and shape share a compilation. None is within another.
        """
        raise NotImplementedError

    def example_inputs(self, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return zeros of the shapes that the network takes, for ``batch`` images, on its device."""
        raise NotImplementedError

    def facts(self) -> dict[str, int | str]:
        """Return what a record of an evaluation says of the network's shape, by name."""
        raise NotImplementedError

    def tables(self) -> Sequence[Tensor]:
        """Return fixed tables that a paper counts among the parameters."""
        return ()

    def notes(self) -> Sequence[str]:
        """Return sentences on what of its shape a user may not want."""
        return ()
