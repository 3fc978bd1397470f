"""Load a CLIP (Radford et al. 2021) from a folder as its page on the hub has it, read as untrusted files."""

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from core.reading import DamagedFileError, read_regular, sha256_of
from core.records import canonical_hash, parse_object, validate
from data.pretrained import built, read_config, read_weights, require_files, require_heads, transformers_for
from data.text_encoders import CLIPTextShape, hash_of_tables, read_tokenizer

PREPROCESSOR = "preprocessor_config.json"
Size = Annotated[int, Field(ge=1, le=2**13)]  # pixels, or channels
Channel = Annotated[float, Field(ge=-1e3, le=1e3)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e3)]


class Preparation(NamedTuple):
    """The way in which images become inputs: resized to a shortest side, cropped at the center, normalized."""

    shortest_side: int  # pixels
    crop_size: int  # pixels, of a square
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]


class CLIP(NamedTuple):
    """A CLIP of transformers, in float32, with its tokenizer and the preparation of its images."""

    network: Any  # transformers' CLIPModel
    tokenizer: Any
    length: int  # tokens of a caption at most, both ends among them
    preparation: Preparation
    weights_sha256: str  # of the file, or of the hashes of several
    hash: str  # of weights, shape, tokenizer and preparation, which all determine embeddings


def load_clip(folder: str, tokenizer: str | None, setting: str) -> CLIP:
    """Return the CLIP in a local folder: ``config.json``, the weights, ``preprocessor_config.json`` and a tokenizer.

    The tokenizer may be in another folder, ``tokenizer``. Raises ValueError where the folder does not hold a whole
    CLIP, naming the ``setting`` of the metric that gave it, or where transformers is not installed.
    """
    transformers = transformers_for("CLIP")
    remedy = (
        f"copy config.json, the weights, {PREPROCESSOR} and the tokenizer of a CLIP from its page on the hub "
        f"(openai/clip-vit-large-patch14) there, or name another folder by {setting}.folder=PATH."
    )
    config, *weights = require_files(folder, "CLIP", remedy)
    preparation = _read_preparation(Path(folder) / PREPROCESSOR, remedy)
    text = read_config(config, CLIPTextShape, {"clip": "text_config"}, "CLIP")
    vision = read_config(config, _VisionShape, {"clip": "vision_config"}, "CLIP")
    joint = read_config(config, _Joint, {"clip": None}, "CLIP")
    require_heads(config, text.hidden_size, text.num_attention_heads)
    require_heads(config, vision.hidden_size, vision.num_attention_heads)
    if vision.image_size != preparation.crop_size:
        raise ValueError(
            f"{Path(folder) / PREPROCESSOR} crops images to {preparation.crop_size} pixels, but the network in "
            f"{config} sees {vision.image_size}; copy both from one model."
        )
    shapes = {"text_config": asdict(text), "vision_config": asdict(vision), **asdict(joint)}
    made = transformers.CLIPConfig(**shapes)
    network = built(transformers.CLIPModel, made, read_weights(weights, "CLIP"), weights[0], "CLIP")
    table = read_tokenizer(transformers.CLIPTokenizer, tokenizer or folder, text.vocab_size, f"{setting}.tokenizer")
    hashes = [sha256_of(path) for path in weights]
    weights_sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    identity = [weights_sha256, shapes, hash_of_tables(table), preparation]
    return CLIP(
        network.eval().requires_grad_(False),
        table,
        text.max_position_embeddings,
        preparation,
        weights_sha256,
        canonical_hash(identity, spaced=True),
    )


@dataclass(frozen=True)
class _VisionShape:
    """The fields of a CLIP's ``config.json`` that determine what its image encoder gives; no others are used.

    Some versions of transformers leave out values that equal their defaults, which these are.
    """

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 12
    num_attention_heads: Size = 12
    num_channels: Literal[3] = 3
    image_size: Size = 224
    patch_size: Size = 32
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5


@dataclass(frozen=True)
class _Joint:
    """The field of a CLIP's ``config.json`` on the space of both embeddings."""

    projection_dim: Size = 512


@dataclass(frozen=True)
class _Shortest:
    __pydantic_config__ = ConfigDict(extra="forbid")

    shortest_edge: Size


@dataclass(frozen=True)
class _Square:
    __pydantic_config__ = ConfigDict(extra="forbid")

    height: Size
    width: Size


@dataclass(frozen=True)
class _Preprocessor:
    """The fields of a ``preprocessor_config.json`` that determine inputs; no others are used.

    Files of earlier versions have one number for each size.
    """

    size: Size | _Shortest
    crop_size: Size | _Square
    image_mean: tuple[Channel, Channel, Channel]
    image_std: tuple[Deviation, Deviation, Deviation]
    resample: Literal[3]  # bicubic
    do_resize: Literal[True] = True
    do_center_crop: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True
    rescale_factor: Annotated[float, Field(ge=1 / 255 - 1e-9, le=1 / 255 + 1e-9)] = 1 / 255


def _read_preparation(path: Path, remedy: str) -> Preparation:
    """Return the preparation in a file. Raises ValueError, which ends with ``remedy``, where there is none."""
    try:
        content = parse_object(read_regular(path), str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"There is no {error.filename}; {remedy}") from None
    names = [field.name for field in fields(_Preprocessor)]
    found = validate(_Preprocessor, {name: content[name] for name in names if name in content}, str(path))
    size = found.size.shortest_edge if isinstance(found.size, _Shortest) else found.size
    crop = found.crop_size if isinstance(found.crop_size, _Square) else _Square(found.crop_size, found.crop_size)
    if crop.height != crop.width or crop.height > size:
        raise DamagedFileError(
            f"{path} is damaged: it crops {crop.height} x {crop.width} pixels from images of shortest side {size}."
        )
    return Preparation(size, crop.height, found.image_mean, found.image_std)
