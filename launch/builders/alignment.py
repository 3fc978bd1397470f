"""Fit the alignment of a run to the features in its shards."""

from collections.abc import Mapping
from typing import Any

from data.manifest import FeatureShape
from model.network import Network
from train.alignment import REPA

_WAY_OUT = "encode them with data/teacher=dinov2, or use train/alignment=none"


def fill_alignment(section: Mapping[str, Any], features: FeatureShape | None, place: str) -> dict[str, Any]:
    """Return the alignment's section with the setting that follows from the stored features.

    Raises ValueError where they have no features, or others than the config says.
    """
    if "dim" not in section:
        return dict(section)
    if features is None:
        raise ValueError(f"train/alignment=repa needs features of a teacher, but {place} has none; {_WAY_OUT}.")
    if section["dim"] not in (None, features.dim):
        raise ValueError(
            f"alignment.dim is {section['dim']}, but the features in {place} have {features.dim} numbers a "
            "token; leave alignment.dim out, or point data.shards to other shards."
        )
    return {**section, "dim": features.dim}


def require_tokens(network: Network, alignment: REPA, features: FeatureShape) -> None:
    """Raise ValueError where the network has another number of tokens than the features, or no such block."""
    tokens, _ = network.token_shape(alignment.block)
    if tokens != features.tokens:
        raise ValueError(
            f"The network has {tokens} tokens, but the teacher's features in the shards have {features.tokens}; set "
            "another model.patch_size, or encode with another teacher.image_size."
        )
