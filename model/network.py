"""Define the base class of networks: the interface that the rest of the program uses, behind ``conf/model/*.yaml``.

Only model/ depends on more of a network than this. A network takes one config, a dataclass that validates itself; the
keys of its section in ``conf/`` are the fields of that class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any, ClassVar, Self

from torch import Tensor, nn

_SHAPES_OF_A_UNIT = 8  # most shapes of its inputs for which a unit is compiled, which is PyTorch's default


class Network(nn.Module):
    """A denoiser of latents. It has no schedule and no guidance, and never drops the condition."""

    config_class: ClassVar[type]  # of ``config``
    latent_shape: tuple[int, int, int]  # (c, h, w)
    out_channels: int  # of its output
    label_table: str | None = None  # name of the weight with a row for each class and, usually, one for the null class
    same_settings: ClassVar[tuple[str, ...]] = ()  # settings without whose agreement weights have another meaning

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._built_as: Any = type(self)  # FSDP2 gives sharded modules classes of its own

    def twin(self) -> Self:
        """Return a new network of the same config. Under the meta device it takes no memory."""
        twin: Self = self._built_as(self.config)
        return twin

    def forward(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction: [B, c, h, w] float, [B] int64 or float, tensors [B, ...] by name -> [B, c', h, w]."""
        raise NotImplementedError

    def initialize(self, seed: int) -> None:
        """Draw new weights from one generator with this seed. Nothing is drawn on the meta device."""
        raise NotImplementedError

    def units(self) -> Sequence[nn.Module]:
        """Return the modules that are compiled, recomputed and sharded one by one.

        Units of one class and shape share a compilation. No unit contains another.
        """
        raise NotImplementedError

    def token_shape(self, unit: int) -> tuple[int, int]:
        """Return (T, d) of the image's tokens after ``unit``, counted from 1.

        Raises ValueError where there is no such unit, or where the network has no tokens.
        """
        raise ValueError(
            f"The network {type(self).__name__} has 0 tokens of the image to align; use train/alignment=none."
        )

    def with_tokens(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor], unit: int) -> tuple[Tensor, Tensor]:
        """Return the prediction, as `forward` does, and the image's tokens [B, T, d] after ``unit``, from 1."""
        raise NotImplementedError

    def example_inputs(self, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return zeros of the shapes that the network takes, for ``batch`` images, on its device."""
        raise NotImplementedError

    def facts(self) -> dict[str, int | str]:
        """Return the facts on the network's shape, by name, that records of evaluations contain.

        ``family`` is required: figures compare networks of one family. The report also uses ``size`` (a name), or
        ``width`` and ``depth``, and ``patch_size`` and ``block`` where the network has them.
        """
        raise NotImplementedError

    def tables(self) -> Sequence[Tensor]:
        """Return the fixed tables that the paper counts as parameters."""
        return ()

    def notes(self) -> Sequence[str]:
        """Return warnings about the network's shape, one sentence each."""
        return ()

    @property
    def num_classes(self) -> int:
        """Return the number of classes that it embeds, without the null class; 0 for an unconditional network."""
        return int(self.config.num_classes)

    @property
    def has_null_class(self) -> bool:
        """Return whether the condition can be dropped. Weights of other programs may have no row for that."""
        return True

    def config_for_classes(self, num_classes: int, null_class: bool) -> Any:
        """Return the config of the same network for other classes. ``null_class`` counts where the config says it."""
        return replace(self.config, num_classes=num_classes)

    def notes_on_weights(self) -> Sequence[str]:
        """Return a clause on each way in which its weights, of another program, differ from those trained here."""
        return ()

    def require_start(self, found: Self, where: str) -> Sequence[str]:
        """Return sentences on the parts of ``found``, which was read from ``where``, that a run does not start with.

        Raises ValueError where the weights would have another meaning in this network, although their shapes agree.
        """
        return ()


def checkpoint_units(network: Network, checkpoint: Callable[..., Any]) -> None:
    """Keep only units' inputs for the backward pass, which recomputes the rest: less memory, a third more compute.

    ``checkpoint(function, unit, *arguments)`` is the runtime's activation-checkpointing function. Arguments and results
    are trees of tensors and other values.
    """

    def forward(unit: nn.Module, *arguments: Any, **named: Any) -> Any:
        if named:
            return checkpoint(_forward_with_names, unit, arguments, named)
        return checkpoint(type(unit).forward, unit, *arguments)

    for unit in network.units():
        # One function takes every unit as an argument, so that it is compiled once for all of them.
        unit.forward = MethodType(forward, unit)


def compile_each_unit(network: Network) -> None:
    """Compile the network unit by unit. Units of one class and shape share a compilation."""
    import torch._dynamo.config as limits  # imported late: PyTorch's compiler takes a second

    units = network.units()
    # By default, a function that was compiled for 8 shapes runs uncompiled for others. A U-Net's units have more.
    limits.recompile_limit = max(limits.recompile_limit, _SHAPES_OF_A_UNIT * len(units))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _SHAPES_OF_A_UNIT * len(units))
    for unit in units:
        unit.compile()


def _forward_with_names(unit: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
    return type(unit).forward(unit, *arguments, **named)
