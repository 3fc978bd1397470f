"""Load the weights that a network starts with: check that the shapes agree, and renew what cannot be taken over."""

from model.diffusers_weights import FIXED_WITHIN
from model.dit import DiT
from model.network import Network
from model.released import ROUNDING, add_null_class, replace_label_table

# Settings that must agree for weights to have the same meaning. Other classes need only a new label table, and no
# weight depends on the latent's size, since the position embedding of a run is the fixed one.
_SHAPE = ("channels", "patch_size", "width", "depth", "num_heads", "frequency_shift")


def take_over(network: Network, found: Network, where: str) -> list[str]:
    """Fill ``network`` with the weights of ``found``, which was read from ``where``.

    Return sentences on what was not taken over. Raises ValueError where the shapes differ, naming both.
    """
    notes: list[str] = []
    if isinstance(network, DiT) and isinstance(found, DiT):
        found, notes = _fitted(network, found, where)
    try:
        network.load_state_dict(found.state_dict())
    except RuntimeError as error:
        raise ValueError(f"init_from {where} has other blocks than model.block: {error}") from error
    return notes


def _fitted(model: DiT, found: DiT, where: str) -> tuple[DiT, list[str]]:
    """Return the network ``found`` with a label table for the classes of ``model``, and notes on the changes."""
    _require_shape(model, found, where)
    notes = _require_fixed_positions(model, found, where)
    if found.config.num_classes != model.config.num_classes:
        notes.append(
            f"{where} has {found.config.num_classes} classes and this run {model.config.num_classes}: the label "
            "table starts anew, all other weights are taken over."
        )
        found = replace_label_table(found, model.config.num_classes)
    elif not found.has_null_class:
        notes.append(f"{where} has no null class: its row of the label table starts anew, all others are taken over.")
        found = add_null_class(found)
    return found, notes


def _require_shape(model: DiT, found: DiT, where: str) -> None:
    for name in _SHAPE:
        theirs, ours = getattr(found.config, name), getattr(model.config, name)
        if theirs != ours:
            raise ValueError(f"init_from {where} has {name} {theirs}, but model.{name} is {ours}; set it to {theirs}.")


def _require_fixed_positions(model: DiT, found: DiT, where: str) -> list[str]:
    """Return notes on replacing the position embedding by the fixed one. Raises ValueError where it was trained."""
    drift, notes = found.position_drift(), []
    if drift > FIXED_WITHIN:
        raise ValueError(
            f"init_from {where} has a trained position embedding, which differs by up to {drift:.3g} from the fixed "
            "one of a run; start from weights with a fixed one."
        )
    if found.config.latent_size != model.config.latent_size:
        notes.append(
            f"{where} has latents of side {found.config.latent_size} and this run of {model.config.latent_size}: all "
            "weights are taken over, and the position embedding is the fixed one of this run's grid."
        )
    elif drift > ROUNDING:
        notes.append(f"{where}: this run replaces its position embedding by the fixed one (difference {drift:.2g}).")
    return notes
