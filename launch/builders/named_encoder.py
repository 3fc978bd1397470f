"""Name the text encoder of an exported network of text, which is not exported with it, and read that name back."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from core.atomic import write_bytes
from core.reading import is_absent, read_regular
from core.records import parse_object, seal, unseal, validate
from data.manifest import TextSpec
from launch.builders.saved_configs import component, setting
from model.family import TEXT_ENCODER

NAME_FILE = "text_encoder.json"  # in a folder
# The words of the command line for each kind of text encoder; others than these are CLIP's.
_WORDS = {"t5": "data/text_encoder=t5 text_encoder.folder=PATH", "random_text": "data/text_encoder=random"}
_IDENTITY = re.compile(r"(\S+) (\S+) \((\d{1,5}) tokens of (\d{1,7}), layer (\w+), (fp32|bf16)\)", re.ASCII)  # of str


@dataclass(frozen=True)
class NamedEncoder:
    """The text encoder that a network was trained with, and how the network uses it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    encoder: TextSpec
    attend_to_padding: bool  # whether it saw the tokens behind a caption's end
    class_dropout: Annotated[float, Field(ge=0, le=1)]  # fraction of captions that were dropped

    def record(self) -> dict[str, Any]:
        """Return the sealed JSON values."""
        return seal(asdict(self))

    def stated(self) -> dict[str, str]:
        """Return the argument by which a file of weights names it."""
        return {TEXT_ENCODER: json.dumps(self.record())}

    def note(self) -> str:
        """Return a sentence for a user."""
        words = _WORDS.get(self.encoder.name, "data/text_encoder=clip text_encoder.folder=PATH")
        return (
            f"it is for captions by the text encoder {self.encoder}, which is not exported: give {words} to the jobs "
            "that use it."
        )


def encoder_in_config(config: Mapping[str, Any], said_by: str) -> NamedEncoder | None:
    """Return the text encoder of a run's config, or None for a run without text.

    Raises ValueError, naming the file ``said_by``, where it is damaged.
    """
    condition = component(config, "condition", said_by)
    if "encoder" not in condition:
        return None
    said = _IDENTITY.fullmatch(str(condition["encoder"]))
    if said is None:
        raise ValueError(f"{said_by} does not name its text encoder, but {condition['encoder']!r:.100}; train it anew.")
    name, revision, length, dim, layer, precision = said.groups()
    spec = {"name": name, "revision": revision, "layer": layer, "precision": precision}
    spec |= {"length": int(length), "dim": int(dim), "pooled_dim": condition.get("pooled_dim")}
    padding, dropout = condition.get("attend_to_padding", False), setting(config, "class_dropout", said_by)
    content = {"encoder": spec, "attend_to_padding": padding, "class_dropout": float(dropout)}
    return validate(NamedEncoder, content, said_by)


def write_encoder_name(folder: Path, named: NamedEncoder) -> None:
    """Write ``text_encoder.json`` into an exported folder."""
    write_bytes(folder / NAME_FILE, json.dumps(named.record(), indent=2).encode())


def read_encoder_name(folder: Path, arguments: Mapping[str, Any]) -> NamedEncoder | None:
    """Return the text encoder that a folder names, or the arguments in a file of weights; None where neither does.

    Raises DamagedFileError for one that is damaged.
    """
    if TEXT_ENCODER in arguments:
        return _parsed(str(arguments[TEXT_ENCODER]), f"{TEXT_ENCODER} in the arguments of {folder}")
    path = folder / NAME_FILE
    try:
        return _parsed(read_regular(path), str(path))
    except OSError as error:
        if is_absent(error):
            return None
        raise


def _parsed(text: bytes | str, said_by: str) -> NamedEncoder:
    return validate(NamedEncoder, unseal(parse_object(text, said_by), said_by), said_by)
