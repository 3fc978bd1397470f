"""Load ``init_from``: the weights, of this or another program, that a new run starts with."""

from launch.builders.build import load_model, require_outputs
from launch.builders.foreign import Facts, is_foreign, read_foreign
from model.network import Network
from model.released import describe
from model.starting import take_over


def load_starting_weights(model: Network, where: str) -> list[str]:
    """Fill ``model`` with weights of another program, or with the EMA of a run or checkpoint of ours.

    Returns sentences on how they were read and what was not taken over. Raises ValueError where there are no weights,
    and, naming both shapes, where shapes differ.
    """
    if is_foreign(where):
        run = describe(model)
        facts = Facts(frequency_shift=run.frequency_shift, likely_heads=run.num_heads, likely_classes=run.num_classes)
        network = read_foreign(where, "ema", facts)
        found, notes = network.model, list(network.notes)
    else:
        found, notes = load_model(where, "ema"), []
    require_outputs(found, model.out_channels // model.latent_shape[0], of=where)
    return [*notes, *take_over(model, found, where)]
