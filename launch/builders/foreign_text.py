"""Give a network of text of another program its captions: by the text encoder of the job, or of its own pipeline."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.conditions import Place
from data.text_conditions import TextCondition
from launch.builders.diffusers_folder import PARTS
from launch.builders.hub import at_commit, in_hub_cache
from launch.builders.named_encoder import NamedEncoder, read_encoder_name
from launch.builders.text_encoders import encoder_of
from model.network import Network
from model.text_embedding import POOLED, TOKENS

_STABLE_DIFFUSIONS_DROPOUT = 0.1  # fraction of captions that its trainer replaced by the empty one
_COMMIT = re.compile(r"[0-9a-f]{40}")


def text_named_by(path: Path, arguments: Mapping[str, Any]) -> NamedEncoder | None:
    """Return the text encoder that an export of ours names for the network in ``path``, or None."""
    return read_encoder_name(_pipeline_of(path), arguments)


def dropout_of(named: NamedEncoder | None) -> float:
    """Return the fraction of captions that were dropped in training; Stable Diffusion's where nothing states it."""
    return _STABLE_DIFFUSIONS_DROPOUT if named is None else named.class_dropout


def text_condition(
    where: str, path: Path, model: Network, named: NamedEncoder | None, section: Mapping[str, Any] | None, place: Place
) -> tuple[TextCondition, list[str]]:
    """Return the source of a network's captions, and sentences on where its text encoder is from.

    ``section`` is the job's text encoder, which takes precedence over the one in the pipeline's folder. Nothing is
    read before a caption is encoded. Where no export names another, it is a network of Stable Diffusion, which also
    attends to padding.
    """
    notes = []
    if section is None and (own := _own_encoder(where, path)) is not None:
        section = {"_target_": "data.text_encoders.CLIPText", "folder": own}
        notes.append(f"{where}: its own text encoder is used, {own}.")
    embedded = model.example_inputs(1)[2]
    condition = TextCondition(
        encoder=None if named is None else str(named.encoder),
        length=None if named is None else named.encoder.length,
        dim=embedded[TOKENS].shape[2] if TOKENS in embedded else None,
        pooled_dim=embedded[POOLED].shape[1] if POOLED in embedded else None,
        attend_to_padding=named is None or named.attend_to_padding,
    )
    condition.prepare(place, encoder_of(section))
    return condition, notes


def _pipeline_of(path: Path) -> Path:
    """Return the folder of the pipeline that a file or folder of a network is in, or that it is itself."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name in PARTS else folder


def _own_encoder(where: str, path: Path) -> str | None:
    """Return the folder of the pipeline's text encoder, or the commit of its model on the hub; None without one."""
    folder = _pipeline_of(path)
    if (folder / "text_encoder").is_dir() and not in_hub_cache(folder / "text_encoder" / "config.json"):
        return str(folder / "text_encoder")
    of_hub = not Path(where).exists() and _COMMIT.fullmatch(folder.name) is not None
    return at_commit(where, folder.name) if of_hub else None
