"""Load the weights that a network starts with: check that the shapes agree, and renew what cannot be taken over."""

from typing import TypeVar

import torch
from torch import Tensor

from model.network import Network

N = TypeVar("N", bound=Network)


def take_over(network: Network, found: Network, where: str) -> list[str]:
    """Fill ``network`` with the weights of ``found``, which was read from ``where``.

    Return sentences on what was not taken over. Raises ValueError where families or shapes differ, naming both.
    """
    if type(found) is not type(network):
        theirs, ours = (one.facts()["family"] for one in (found, network))
        raise ValueError(
            f"init_from {where} has weights of the family {theirs}, but this run's network is of {ours}; choose a "
            "model of the weights' family."
        )
    _require_settings(network, found, where)
    notes = list(network.require_start(found, where))
    if network.label_table is not None and found.label_table is not None:
        found, more = _with_labels_of(network, found, where)
        notes += more
    weights = found.state_dict()
    _require_tensors(network, weights, where)
    network.load_state_dict(weights)
    return notes


def replace_label_table(network: N, num_classes: int, null_class: bool = True) -> N:
    """Return the same network for another number of classes; only its label table is new, drawn from seed 0."""
    renewed = type(network)(network.config_for_classes(num_classes, null_class))
    kept = {name: value for name, value in network.state_dict().items() if name != network.label_table}
    renewed.load_state_dict(kept, strict=False)
    for ours, theirs in zip(renewed.tables(), network.tables(), strict=True):
        ours.copy_(theirs)
    return renewed


@torch.no_grad()
def add_null_class(network: N) -> N:
    """Return the same network with a new row for the null class, drawn from seed 0, after its classes' rows."""
    return _with_the_same_classes(network, True)


@torch.no_grad()
def _with_the_same_classes(network: N, null_class: bool) -> N:
    changed, rows = replace_label_table(network, network.num_classes, null_class), network.num_classes
    _labels(changed)[:rows] = _labels(network)[:rows]
    return changed


def _labels(network: Network) -> Tensor:
    assert network.label_table is not None, "the network has no labels"
    return network.get_parameter(network.label_table)


def _require_settings(network: Network, found: Network, where: str) -> None:
    for name in network.same_settings:
        theirs, ours = getattr(found.config, name), getattr(network.config, name)
        if theirs != ours:
            raise ValueError(f"init_from {where} has {name} {theirs}, but model.{name} is {ours}; set it to {theirs}.")


def _with_labels_of(network: Network, found: N, where: str) -> tuple[N, list[str]]:
    """Return the network ``found`` with a label table for the classes of ``network``, and notes on the changes."""
    if found.num_classes != network.num_classes:
        note = (
            f"{where} has {found.num_classes} classes and this run {network.num_classes}: the label table starts "
            "anew, all other weights are taken over."
        )
        return replace_label_table(found, network.num_classes, network.has_null_class), [note]
    if found.has_null_class == network.has_null_class:
        return found, []
    note = f"{where} has no null class: its row of the label table starts anew, all others are taken over."
    if found.has_null_class:
        note = f"{where} has a null class and this run has none: its row of the label table is not taken over."
    return _with_the_same_classes(found, network.has_null_class), [note]


def _require_tensors(network: Network, weights: dict[str, Tensor], where: str) -> None:
    ours = {name: value.shape for name, value in network.state_dict().items()}
    theirs = {name: value.shape for name, value in weights.items()}
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        name = differing[0]
        shapes = [tuple(shape) if (shape := shapes.get(name)) is not None else "absent" for shapes in (theirs, ours)]
        raise ValueError(
            f"init_from {where} has other blocks than model.block: {name} is {shapes[0]} there and {shapes[1]} here "
            f"({len(differing)} tensors differ); choose the model's parts as they were in that training."
        )
