"""Build the text encoder of a job, whose folders may be names on the Hugging Face hub."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from data.text_encoders import TextEncoder
from launch.builders.components import build
from launch.builders.hub import at_commit, fetch_text_encoder, names_hub

_PLACES = ("folder", "tokenizer")  # settings that may name a model of the hub


def build_text_encoder(section: Mapping[str, Any]) -> TextEncoder:
    """Return the text encoder of a section, whose models of the hub are fetched into its cache.

    Raises ValueError for a name that is neither here nor on the hub, and for a folder that is not whole.
    """
    local = {name: str(fetch_text_encoder(value)[0]) for name, value in _on_hub(section).items()}
    encoder: TextEncoder = build({**section, **local})
    return encoder


def encoder_of(section: Mapping[str, Any] | None) -> Callable[[], TextEncoder] | None:
    """Return a function that reads the text encoder of a section, or None without one."""
    return None if section is None else partial(build_text_encoder, section)


def pinned_names(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section with each name of the hub followed by its commit, so that later jobs read the same files.

    Raises ValueError as `build_text_encoder`.
    """
    pinned = {name: at_commit(value, fetch_text_encoder(value)[1]) for name, value in _on_hub(section).items()}
    return {**section, **pinned}


def _on_hub(section: Mapping[str, Any]) -> dict[str, str]:
    given = {name: section.get(name) for name in _PLACES}
    return {name: value for name, value in given.items() if isinstance(value, str) and names_hub(value)}
