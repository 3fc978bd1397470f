"""``init_from``: weights that a new run starts with, from any program."""

from launch.build import load_model, require_outputs
from launch.foreign import ROUNDING, Facts, is_foreign, read_foreign
from model.diffusers_weights import FIXED_WITHIN
from model.dit import DiT
from model.released import add_null_class, replace_label_table

# What must agree for weights to mean the same. Classes only renew the label table, and no weight knows of the
# latent's size, since the position embedding of a run is the fixed one.
_SHAPE = ("channels", "patch_size", "width", "depth", "num_heads", "frequency_shift")


def load_starting_weights(model: DiT, where: str) -> list[str]:
    """Fill ``model`` from weights of another program, or a run or checkpoint of ours (its EMA).

    Returns sentences on how they were read and what was not taken over. Raises ValueError where there are no weights,
    or the shapes differ, naming both.
    """
    shape = model.config
    if is_foreign(where):
        facts = Facts(
            frequency_shift=shape.frequency_shift, likely_heads=shape.num_heads, likely_classes=shape.num_classes
        )
        network = read_foreign(where, "ema", facts)
        found, notes = network.model, list(network.notes)
    else:
        found, notes = load_model(where, "ema"), []
    require_outputs(found, model.config.outputs_per_channel, of=where)
    _require_shape(model, found, where)
    notes += _require_fixed_positions(model, found, where)
    if found.config.num_classes != shape.num_classes:
        notes.append(
            f"{where} knows {found.config.num_classes} classes and this run {shape.num_classes}: the label "
            "table starts anew, all other weights are taken over."
        )
        found = replace_label_table(found, shape.num_classes)
    elif not found.has_null_class:
        notes.append(f"{where} has no null class: its row of the label table starts anew, all others are taken over.")
        found = add_null_class(found)
    try:
        model.load_state_dict(found.state_dict())
    except RuntimeError as error:
        raise ValueError(f"init_from {where} has other blocks than model.block: {error}") from error
    return notes


def _require_shape(model: DiT, found: DiT, where: str) -> None:
    for name in _SHAPE:
        theirs, ours = getattr(found.config, name), getattr(model.config, name)
        if theirs != ours:
            raise ValueError(f"init_from {where} has {name} {theirs}, but model.{name} is {ours}; set it to {theirs}.")


def _require_fixed_positions(model: DiT, found: DiT, where: str) -> list[str]:
    """Return what becomes of the position embedding, which a run has fixed. Raises ValueError where it was trained."""
    drift, notes = found.position_drift(), []
    if drift > FIXED_WITHIN:
        raise ValueError(
            f"init_from {where} has a trained position embedding, up to {drift:.3g} off the fixed one that a run has; "
            "start from weights of a fixed one."
        )
    if found.config.latent_size != model.config.latent_size:
        notes.append(
            f"{where} is of latents of side {found.config.latent_size} and this run of {model.config.latent_size}: all "
            "weights are taken over, the position embedding is the fixed one of this run's grid."
        )
    elif drift > ROUNDING:
        notes.append(f"{where}: in this run the fixed position embedding takes the place of its own ({drift:.2g} off).")
    return notes
