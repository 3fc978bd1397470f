"""``init_from``: weights that a new run starts with, from any program."""

from pathlib import Path

from launch.build import load_model
from launch.foreign import is_foreign, read_foreign
from model.convert import replace_label_table
from model.dit import DiT

# What must agree for weights to mean the same. Another number of classes only renews the label table.
_SHAPE = ("latent_size", "channels", "patch_size", "width", "depth", "num_heads", "learn_sigma", "frequency_shift")


def load_starting_weights(model: DiT, where: str) -> list[str]:
    """Fill ``model`` from a released ``.pt``, a diffusers folder, or a run or checkpoint of ours (its EMA).

    Returns sentences on what was not taken over. Raises ValueError where there are no weights, or the shapes
    differ, naming both.
    """
    path, shape = Path(where), model.config
    found = read_foreign(path, shape.num_heads, shape.frequency_shift) if is_foreign(path) else load_model(where, "ema")
    for name in _SHAPE:
        theirs, ours = getattr(found.config, name), getattr(model.config, name)
        if theirs != ours:
            raise ValueError(f"init_from {where} has {name} {theirs}, but model.{name} is {ours}; set it to {theirs}.")
    notes = []
    if found.config.num_classes != model.config.num_classes:
        notes.append(
            f"{where} knows {found.config.num_classes} classes and this run {model.config.num_classes}: the label "
            "table starts anew, all other weights are taken over."
        )
        found = replace_label_table(found, model.config.num_classes)
    try:
        model.load_state_dict(found.state_dict())
    except RuntimeError as error:
        raise ValueError(f"init_from {where} has other blocks than model.block: {error}") from error
    return notes
