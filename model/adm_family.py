"""The family of weights of OpenAI's guided-diffusion, whose network is ADM."""

from collections.abc import Mapping

from torch import Tensor

from model.adm_weights import LABELS, from_adm, to_adm
from model.family import Facts, Family, Reading
from model.network import Network
from model.unet_names import ANCHOR


class GuidedDiffusion(Family):
    """Weights of ADM, of OpenAI's guided-diffusion."""

    name = "ADM"
    program = "adm"
    anchor = ANCHOR
    settings = ("num_heads", "head_dim", "latent_size", "num_classes", "new_attention_order")

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the timestep's embedding has its name, and no block is a transformer as in LDM."""
        return ANCHOR in state and not any(".transformer_blocks." in name for name in state)

    def read(self, state: Mapping[str, Tensor], facts: Facts) -> Reading:
        """Return the network; see `from_adm`. A run that starts with the weights has the image size and the heads."""
        run = facts.like.config if facts.like is not None and self.fits(facts.like) else None
        new_order, heads, head_dim = bool(facts.new_attention_order), facts.num_heads, facts.head_dim
        if heads is None and head_dim is None and run is not None:
            heads, head_dim = run.num_heads, run.head_dim
        network = from_adm(
            state,
            new_order,
            latent_size=run.latent_size if facts.latent_size is None and run is not None else facts.latent_size,
            head_dim=head_dim,
            num_heads=heads,
            num_classes=_classes_of(state, facts),
            upscale=None if run is None or run.upscale == 1 else run.upscale,
        )
        notes = []
        if facts.new_attention_order is None:
            notes.append(
                "queries, keys and values are read in the older order, that of all published files but "
                "64x64_diffusion.pt, for which foreign.new_attention_order=true is needed."
            )
        if (classes := network.num_classes) > 1 and facts.num_classes is None and facts.like is None:
            notes.append(
                f"its label table has {classes} rows, which are read as {classes} classes, without a null class, as in "
                f"all published files; foreign.num_classes={classes - 1} takes the last row for the null class."
            )
        if heads is None and head_dim is None:
            notes.append(
                f"its attention is read with heads of {network.config.head_dim} channels; 128x128_diffusion.pt and "
                "64_256_upsampler.pt need foreign.num_heads=4."
            )
        return Reading(network, tuple(notes))

    def fits(self, network: Network) -> bool:
        """Return whether the network is an ADM."""
        return network.facts()["family"] == self.name

    def write(self, network: Network) -> dict[str, Tensor]:
        """Return the weights under guided-diffusion's names, in the older order of queries, keys and values."""
        return to_adm(network)

    def notes_on_writing(self, network: Network) -> list[str]:
        """Return sentences on the options that guided-diffusion needs with these weights."""
        config = network.config
        heads = (
            f"--num_head_channels {config.head_dim}" if config.num_heads is None else f"--num_heads {config.num_heads}"
        )
        notes = [f"guided-diffusion needs --use_new_attention_order False {heads} for these weights."]
        if config.num_classes and config.null_class:
            notes.append(
                f"the label table has {config.num_classes + 1} rows, the last for the null class; guided-diffusion "
                "takes them for as many classes."
            )
        return notes


def _classes_of(state: Mapping[str, Tensor], facts: Facts) -> int | None:
    """Return the number of classes that is given, or the run's where the label table can have it, or None."""
    rows = state[LABELS].shape[0] if LABELS in state and state[LABELS].dim() == 2 else 0
    possible = (rows - 1, rows) if rows > 1 else (rows,)
    if facts.num_classes is not None and facts.num_classes not in possible:
        raise ValueError(
            f"foreign.num_classes is {facts.num_classes}, but its label table has {rows} rows: {rows} classes, or one "
            f"less and the null class; set it to {' or '.join(map(str, possible))}."
        )
    if facts.num_classes is None and facts.like is not None and facts.like.num_classes == rows - 1 > 0:
        return rows - 1
    return facts.num_classes
