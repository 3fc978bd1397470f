"""The families of weights of CompVis' programs, and that of latent diffusion with classes, whose network is LDM."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from model.dit_families import classes_of
from model.family import Facts, Family, Reading
from model.ldm_weights import LABELS, from_ldm, has_known_heads, label_rows, restored, to_ldm, usual_classes
from model.network import Network
from model.unet_names import ANCHOR


class Unstated(NamedTuple):
    """The parts of a shape that tensors do not tell; None: as published."""

    num_heads: int | None
    head_dim: int | None  # channels
    latent_size: int | None  # side of the latents


class CompVisFamily(Family):
    """Weights of a U-Net whose checkpoints state neither the heads of its transformers nor the size of its latents."""

    def fits(self, network: Network) -> bool:
        """Return whether the network is of this family."""
        return network.facts()["family"] == self.name

    def content(self, network: Network, stated: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of a checkpoint: its ``state_dict`` alone."""
        return {"state_dict": self.write(network)}

    def unstated(self, facts: Facts, has_known_heads: bool, why: str) -> Unstated:
        """Return heads and latent size as settings give them, or else as a run does that starts with the weights.

        Heads that are None are those of the published network. Raises ValueError, with the reason ``why`` they are not
        known, where nothing tells them.
        """
        run = facts.like.config if facts.like is not None and self.fits(facts.like) else None
        num_heads, head_dim = facts.num_heads, facts.head_dim
        if num_heads is None and head_dim is None:
            if run is not None:
                num_heads, head_dim = run.num_heads, run.head_dim
            elif not has_known_heads:
                raise ValueError(
                    f"these weights do not contain their number of heads, and {why}; give foreign.num_heads, or "
                    "foreign.head_dim, the channels of a head."
                )
        size = run.latent_size if facts.latent_size is None and run is not None else facts.latent_size
        return Unstated(num_heads, head_dim, size)


class LatentDiffusion(CompVisFamily):
    """Weights of LDM, of CompVis' latent diffusion."""

    name = "LDM"
    program = "ldm"
    anchor = ANCHOR
    objective = "diffusion=ldm"
    settings = ("num_heads", "head_dim", "latent_size", "num_classes")

    def restored(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of a checkpoint with one prefix for the weights and one for their averages."""
        return restored(tensors)

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the timestep's embedding has its name, and there is a table of labels."""
        return ANCHOR in state and LABELS in state

    def read(self, state: Mapping[str, Tensor], facts: Facts) -> Reading:
        """Return the network; see `from_ldm`. A run that starts with the weights has the latents' size and the heads.

        Raises ValueError too where neither the run, a setting nor the shape of a published network tells the heads.
        """
        why = "their shape is neither LDM-4's nor LDM-8's"
        num_heads, head_dim, size = self.unstated(facts, has_known_heads(state), why)
        num_classes, notes = _classes_of(label_rows(state), facts)
        return Reading(from_ldm(state, num_heads, head_dim, num_classes, size), notes)

    def write(self, network: Network) -> dict[str, Tensor]:
        """Return the weights under the names of a checkpoint of latent diffusion."""
        return to_ldm(network)

    def notes_on_writing(self, network: Network) -> list[str]:
        """Return a sentence on the label table, which the program's config has to state."""
        rows = network.config.num_classes + network.config.null_class if network.config.num_classes else 1
        return [f"latent diffusion needs cond_stage_config.params.n_classes {rows} for these weights."]


def _classes_of(rows: int, facts: Facts) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes of a label table, and a sentence where it is assumed; see `usual_classes`."""
    if facts.num_classes is None and facts.like is None and usual_classes(rows) == rows > 1:
        note = f"its label table has {rows} rows, which are read as {rows} classes, without a null class, as LDM-8's."
        return rows, (note,)
    return classes_of(rows, facts)
