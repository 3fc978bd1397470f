"""The families of weights whose network is a DiT: the released DiT, SiT under the same names, and LightningDiT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.convert import to_sit
from model.diffusers_weights import notes_on_pipeline, to_diffusers
from model.dit import DiT
from model.family import Facts, Family, PipelineParts, Reading
from model.lightningdit import from_lightningdit, has_its_parts, to_lightningdit
from model.network import Network
from model.released import ANCHOR, from_reference, label_rows, to_reference

_SETTINGS = ("num_heads", "num_classes")


class ReleasedDiT(Family):
    """Weights of the released DiT (facebookresearch/DiT)."""

    name = "DiT"
    program = "reference"
    anchor = ANCHOR
    settings: tuple[str, ...] = (*_SETTINGS, "frequency_shift")
    pipeline = "DiTPipeline"

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the patch embedding has its name, and no part is LightningDiT's."""
        return ANCHOR in state and not has_its_parts(state)

    def read(self, state: Mapping[str, Tensor], facts: Facts) -> Reading:
        """Return the network; see `from_reference`."""
        num_classes, notes = classes_of(label_rows(state), facts)
        shift = frequency_shift_of(facts, usual=0)
        return Reading(from_reference(state, heads_of(state, facts), num_classes, shift), notes)

    def fits(self, network: Network) -> bool:
        """Return whether the network is a DiT, of whatever parts."""
        return isinstance(network, DiT)

    def write(self, network: Network) -> dict[str, Tensor]:
        """Return the weights under the released names."""
        return to_reference(network)

    def notes_on_writing(self, network: Network) -> list[str]:
        """Return a sentence where the released code spaces the timestep's frequencies differently."""
        if not network.config.frequency_shift:
            return []
        return ["the released code spaces the timestep's frequencies differently, so its outputs differ slightly."]

    def write_folder(self, network: Network, folder: Path, parts: PipelineParts) -> None:
        """Write a folder of ``DiTPipeline``; see `to_diffusers`."""
        to_diffusers(network, folder, parts.autoencoder, parts.class_names, parts.betas)

    def notes_on_folder(self, network: Network, parts: PipelineParts) -> list[str]:
        """Return sentences on how the pipeline differs from this program; see `notes_on_pipeline`."""
        return notes_on_pipeline(network)


class SiT(ReleasedDiT):
    """Weights of SiT (willisma/SiT): those of the released DiT by names and shapes, for another time."""

    name = "SiT"
    program = "sit"
    reversed_time = True
    objective = "diffusion=sit"

    def write(self, network: Network) -> dict[str, Tensor]:
        """Return the weights under SiT's names."""
        return to_sit(network)

    def content(self, network: Network, stated: Mapping[str, Any]) -> dict[str, Any]:
        """Return the averaged weights with arguments, from which a reader learns that they are SiT's."""
        return {"ema": self.write(network), "args": dict(stated)}

    def notes_on_writing(self, network: Network) -> list[str]:
        """Return nothing: `to_sit` refuses what would be computed differently."""
        return []


class LightningDiT(SiT):
    """Weights of LightningDiT (hustvl/LightningDiT), told from the released DiT's by the parts that only it has."""

    name = "LightningDiT"
    program = "lightningdit"
    objective = "diffusion=flow diffusion.reversed_time=true"
    settings = _SETTINGS

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the patch embedding has its name. With all options off, the names are the released DiT's."""
        return ANCHOR in state

    def read(self, state: Mapping[str, Tensor], facts: Facts) -> Reading:
        """Return the network; see `from_lightningdit`."""
        num_classes, notes = classes_of(label_rows(state), facts)
        return Reading(from_lightningdit(state, heads_of(state, facts), num_classes), notes)

    def write(self, network: Network) -> dict[str, Tensor]:
        """Return the weights under LightningDiT's names."""
        return to_lightningdit(network)


def classes_of(rows: int, facts: Facts) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes of a label table, and a sentence where its number of rows is ambiguous.

    A trainer without label dropout has no row for the null class.
    """
    both = f"its label table has {rows} rows: "
    both += f"{rows - 1} classes and the null class, or {rows} classes of a trainer without label dropout"
    possible = (rows - 1, rows) if rows > 1 else (1,)
    if facts.num_classes is not None:
        if facts.num_classes not in possible:
            ways = " or ".join(map(str, possible))
            raise ValueError(f"foreign.num_classes is {facts.num_classes}, but {both}; set it to {ways}.")
        return facts.num_classes, ()
    if isinstance(facts.trained_classes, int) and facts.trained_classes in possible:
        return facts.trained_classes, ()
    if rows == 1:
        return 1, ("its label table has 1 row: one class, and no null class.",)
    if facts.like is not None and facts.like.num_classes == rows:
        return rows, (f"{both}; the second is taken, since this run has {rows} classes.",)
    if facts.like is not None:  # where the run has other classes, its label table is initialized anew
        return rows - 1, ()
    return rows - 1, (f"{both}; the first is taken, and foreign.num_classes={rows} takes the second.",)


def heads_of(state: Mapping[str, Tensor], facts: Facts) -> int | None:
    """Return the number of heads that is given, or the run's, or None for the paper's.

    A run's that cannot fit the width gives 1: a later check of shapes names both widths.
    """
    if facts.num_heads is not None or not isinstance(facts.like, DiT):
        return facts.num_heads
    likely, width = facts.like.config.num_heads, next(iter(state[ANCHOR].shape), 0)
    return 1 if width % likely else likely


def frequency_shift_of(facts: Facts, usual: int) -> int:
    """Return the shift of the timestep's frequencies that is given, or the run's, or the usual one of a format."""
    if facts.frequency_shift is None and isinstance(facts.like, DiT):
        return facts.like.config.frequency_shift
    return usual if facts.frequency_shift is None else facts.frequency_shift
