"""Define a family of weights: the networks of one program, with the form of its files. `model.families` lists them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from model.network import Network

TEXT_ENCODER = "text_encoder"  # the argument by which a file of weights names that of its captions


@dataclass(frozen=True)
class Facts:
    """Settings that the files of other programs may not state. None: the file's own, or the usual value."""

    family: str | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    latent_size: int | None = None
    num_classes: int | None = None
    frequency_shift: int | None = None
    new_attention_order: bool | None = None
    like: Network | None = None  # of the run that starts with the weights: a hint where the file says nothing
    trained_classes: object = None  # number of classes that the file's trainer saved, not checked


class Reading(NamedTuple):
    """A network that was read, with sentences on how."""

    network: Network
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineParts:
    """The parts of a pipeline of diffusers besides its network, where they are known."""

    autoencoder: Any = None  # diffusers' network
    class_names: tuple[str, ...] = ()
    betas: tuple[float, ...] | None = None  # of the process of the weights; None: they are not known
    prediction: str = "noise"  # the quantity that the network predicts


class Family:
    """The weights of one program: how they are recognized, read and written, and which time their network sees."""

    name: ClassVar[str]  # in messages, and in the arguments that a file of ours states
    program: ClassVar[str]  # in `export to=...`
    anchor: ClassVar[str]  # the tensor by whose name a table of such weights is found
    reversed_time: ClassVar[bool] = False  # whether the network sees 0 as noise and 1 as data
    objective: ClassVar[str] = "diffusion=gaussian"  # settings of the objective that such weights are used with
    settings: tuple[str, ...] = ()  # those of ``foreign`` that its files may not state
    pipeline: ClassVar[str]  # class of diffusers, for families with folders of diffusers
    folder_predictions: ClassVar[tuple[str, ...]] = ("noise",)  # quantities that networks in such folders may predict

    def restored(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors of one mapping of a file, with names by which whole tables begin with one prefix each.

        A table is all the tensors whose names have the prefix of an ``anchor``. Most trainers store it that way.
        """
        return tensors

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether names and shapes of a table, without their prefix, are of this family."""
        raise NotImplementedError

    def read(self, state: Mapping[str, Tensor], facts: Facts) -> Reading:
        """Return the network with these weights. Raises ValueError naming the first tensors that do not fit."""
        raise NotImplementedError

    def fits(self, network: Network) -> bool:
        """Return whether the network is of the class that `read` returns."""
        raise NotImplementedError

    def write(self, network: Network) -> dict[str, Tensor]:
        """Return the weights under the program's names. Raises ValueError for a network that it cannot express."""
        raise NotImplementedError

    def content(self, network: Network, stated: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of a file for the program. ``stated`` are the trainer's arguments, where it has any."""
        return dict(self.write(network))

    def notes_on_writing(self, network: Network) -> list[str]:
        """Return sentences on what the program computes differently with these weights."""
        return []

    def write_folder(self, network: Network, folder: Path, parts: PipelineParts) -> None:
        """Write a folder of ``pipeline``. Raises ValueError for a network that diffusers cannot express."""
        raise NotImplementedError

    def notes_on_folder(self, network: Network, parts: PipelineParts) -> list[str]:
        """Return sentences on what the pipeline needs besides, or computes differently."""
        return []
