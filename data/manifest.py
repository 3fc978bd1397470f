"""Write, read and check ``manifest.json``, the description of a folder of shards."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import ConfigDict, Field

from core.atomic import write_bytes
from core.names import inside, plain_name
from core.reading import DamagedFileError, read_regular, remedied
from core.records import check, parse_object, seal, unseal
from core.remote import DEFAULT_RETRY, DamagedError, Retry, is_remote, join, read_bytes
from data.autoencoder_identity import AutoencoderIdentity

FORMAT_VERSION: Final = 2
MANIFEST_NAME = "manifest.json"
CAPTIONS_NAME = "captions.npz"
EMPTY_CAPTION_NAME = "empty_caption.npz"
FORMAT = "the format of shards"  # named in errors as the origin of the other files' names
MAX_MANIFEST_BYTES = 2**25  # 190,000 shards
MAX_SOURCE_ID = 1024  # characters

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=2**16)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**30)]
_REMEDY = "delete it and run `ditscale encode` again"
_REMOTE_REMEDY = "copy it there again from the folder of `ditscale encode`"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar")


@dataclass(frozen=True)
class LatentSpec:
    """The description of latents. Shards whose description disagrees with the config are rejected."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    source: Text
    image_size: Annotated[int, Field(ge=1, le=2**16)]  # pixels, side of the square image
    autoencoder: Text
    autoencoder_revision: Text
    scale: Finite | list[Finite]  # the diffusion sees (z - shift) x scale; one number, or one per channel
    downscale: Annotated[int, Field(ge=1, le=2**16)]  # image side / latent side
    channels: Annotated[int, Field(ge=1, le=2**12)]  # c of the latent
    dtype: Literal["float16"]  # of the stored moments
    flip: bool  # whether mirrored images are stored too
    num_classes: Annotated[int, Field(ge=1, le=2**24)]
    shift: Finite | list[Finite] = 0.0
    precision: Text = "fp32"  # of the autoencoder's network
    crop: Text = "none"  # `name` of the crop
    apply_exif: bool = False  # whether images were rotated as their EXIF data say

    @property
    def made_by(self) -> AutoencoderIdentity:
        """Return the autoencoder of these latents."""
        return AutoencoderIdentity(
            self.autoencoder, self.autoencoder_revision, self.downscale, self.channels, self.scale, self.shift
        )

    @property
    def latent_size(self) -> int:
        """Return the side h = w of the latent."""
        return self.image_size // self.downscale

    @property
    def num_orientations(self) -> int:
        """Return the number of orientations of a sample: 1, or 2 with mirrored images."""
        return 2 if self.flip else 1

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """Return the shape [orientations, 2c, h, w] of one stored sample."""
        return (self.num_orientations, 2 * self.channels, self.latent_size, self.latent_size)

    @cached_property
    def sample_bytes(self) -> int:
        """Return the bytes of the values of one stored sample."""
        return 2 * math.prod(self.sample_shape)

    def differences(self, other: "LatentSpec") -> list[str]:
        """Return "name is A and not B" for each field that differs, where B is the value in ``other``."""
        return [
            f"{field.name} is {getattr(self, field.name)!r} and not {getattr(other, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


class FeatureShape(NamedTuple):
    """The shape of a teacher's features of one image."""

    tokens: int  # T
    dim: int  # D


@dataclass(frozen=True)
class TeacherSpec:
    """A pretrained network and the shape [T, D] of its features of an image, stored for each orientation."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Text
    revision: Text  # hash of its weights
    image_size: Annotated[int, Field(ge=1, le=2**16)]  # pixels, to which it resizes images
    tokens: Annotated[int, Field(ge=1, le=2**20)]  # T
    dim: Annotated[int, Field(ge=1, le=2**16)]  # D

    @property
    def shape(self) -> FeatureShape:
        """Return the shape of the features of one image."""
        return FeatureShape(self.tokens, self.dim)

    def sample_shape(self, spec: LatentSpec) -> tuple[int, int, int]:
        """Return the shape [orientations, T, D] of the features of one stored sample, float16."""
        return (spec.num_orientations, self.tokens, self.dim)

    def sample_bytes(self, spec: LatentSpec) -> int:
        """Return the bytes of the features of one stored sample."""
        return 2 * math.prod(self.sample_shape(spec))

    def __str__(self) -> str:
        return f"{self.name} {self.revision} at {self.image_size} pixels ({self.tokens} tokens of {self.dim})"


@dataclass(frozen=True)
class ShardEntry:
    """One file of a folder of shards: a tar, or the embeddings of its captions."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=255)]
    count: Count  # samples, or captions
    bytes: Annotated[int, Field(ge=1, le=2**50)]
    sha256: Sha256


@dataclass(frozen=True)
class TextSpec:
    """The identity of a text encoder and the shape of what it gives."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Text
    revision: Text  # hash of config, weights and tokenizer
    layer: Text  # whose tokens are used
    precision: Literal["fp32", "bf16"]
    length: Annotated[int, Field(ge=1, le=2**12)]  # M
    dim: Annotated[int, Field(ge=1, le=2**20)]  # D
    pooled_dim: Annotated[int, Field(ge=1, le=2**20)]  # P

    @property
    def max_empty_bytes(self) -> int:
        """Return the bytes of the largest ``empty_caption.npz`` of this encoder."""
        return 2**14 + self.length * (2 * self.dim + 1) + 2 * self.pooled_dim

    @property
    def caption_bytes(self) -> int:
        """Return the bytes of the stored embedding of one caption, float16 tokens [M, D] and pooled [P]."""
        return 2 * (self.length * self.dim + self.pooled_dim)

    def __str__(self) -> str:
        tokens = f"{self.length} tokens of {self.dim}"
        return f"{self.name} {self.revision} ({tokens}, layer {self.layer}, {self.precision})"


@dataclass(frozen=True)
class TokensSpec:
    """The token ids beside the captions, and the embeddings of the empty caption and of others, by one text encoder."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    encoder: TextSpec
    num_truncated: Annotated[int, Field(ge=0, le=2**40)]  # captions longer than the encoder's length
    empty_sha256: Sha256  # of empty_caption.npz
    embeddings: list[ShardEntry] | None = None  # the file of each shard; None where they are not stored


@dataclass(frozen=True)
class CaptionsSpec:
    """The file with the captions of all samples."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    sha256: Sha256
    bytes: Annotated[int, Field(ge=1, le=2**50)]
    count: Annotated[int, Field(ge=1, le=2**40)]  # captions; each sample has at least one
    tokens: TokensSpec | None = None  # None where texts alone are stored

    @classmethod
    def of(cls, content: dict[str, Any]) -> "CaptionsSpec":
        """Return the part of a manifest, after its fields were checked."""
        tokens = content.pop("tokens", None)
        if tokens is None:
            return cls(**content)
        encoder, stored = TextSpec(**tokens.pop("encoder")), tokens.pop("embeddings", None)
        embeddings = None if stored is None else [ShardEntry(**entry) for entry in stored]
        return cls(**content, tokens=TokensSpec(encoder=encoder, **tokens, embeddings=embeddings))

    @property
    def entry(self) -> ShardEntry:
        """Return the file as it is opened or fetched, in the way of a shard."""
        return ShardEntry(CAPTIONS_NAME, self.count, self.bytes, self.sha256)


@dataclass(frozen=True)
class Manifest:
    """The description of a folder of shards. ``latent_mean`` and ``latent_std`` are per channel and unscaled."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format_version: Literal[2]
    plan_hash: Sha256
    spec: LatentSpec
    class_names: list[Text]
    shards: Annotated[list[ShardEntry], Field(min_length=1)]
    index_sha256: Sha256
    latent_mean: list[Finite]
    latent_std: list[Annotated[Finite, Field(ge=0)]]
    num_skipped: Count  # images that could not be read; skipped.jsonl lists them with the reasons
    labels_sha256: Sha256 | None = None  # None in folders of earlier versions, which have no labels.npz
    teacher: TeacherSpec | None = None  # None where no features are stored
    captions: CaptionsSpec | None = None  # None where samples have no captions

    @property
    def num_samples(self) -> int:
        """Return the number of samples in all shards."""
        return sum(shard.count for shard in self.shards)

    @property
    def embeddings(self) -> list[ShardEntry]:
        """Return the file with the embeddings of each shard's captions; none where they are not stored."""
        tokens = self.captions and self.captions.tokens
        return tokens.embeddings or [] if tokens else []

    @property
    def max_index_bytes(self) -> int:
        """Return the bytes of the largest ``index.npz`` that can belong to this manifest."""
        return self.max_labels_bytes + self.num_samples * 4 * MAX_SOURCE_ID

    @property
    def max_labels_bytes(self) -> int:
        """Return the bytes of the largest ``labels.npz`` that can belong to this manifest."""
        return 2**16 + self.num_samples * 8 + 16 * len(self.shards)

    @property
    def hash(self) -> str:
        """Return the identity of the data that a run trains on: the SHA-256 of the JSON without its seal.

        It leaves out ``labels_sha256``, so that data keep their identity when this version completes their folder.
        """
        content = {name: value for name, value in _without_none(asdict(self)).items() if name != "labels_sha256"}
        return hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``manifest.json``, with a hash of its content; it must be the last file written to the folder."""
        content = seal(_without_none(asdict(self)))
        write_bytes(folder / MANIFEST_NAME, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, folder: Path | str, retry: Retry = DEFAULT_RETRY) -> "Manifest":
        """Read ``manifest.json`` of a folder or URL.

        Raises ValueError where it is missing, damaged or of another version, or where a remote store does not answer.
        """
        path, remedy = join(folder, MANIFEST_NAME), _REMOTE_REMEDY if is_remote(folder) else _REMEDY
        with remedied(remedy):
            return cls._parsed(_content(folder, path, retry), path)

    @classmethod
    def _parsed(cls, text: bytes, path: str) -> "Manifest":
        """Return the manifest in a file's content, with unconverted values, because `hash` depends on their text."""
        content = unseal(parse_object(text, path), path, required=False)  # earlier versions wrote no hash
        version = content.get("format_version")
        if type(version) is int and version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, but this program reads version {FORMAT_VERSION}; "
                "encode again with this program."
            )
        check(Manifest, content, path)
        spec = LatentSpec(**content.pop("spec"))
        shards = [ShardEntry(**shard) for shard in content.pop("shards")]
        teacher, captions = content.pop("teacher", None), content.pop("captions", None)
        manifest = cls(
            spec=spec,
            shards=shards,
            teacher=teacher and TeacherSpec(**teacher),
            captions=captions and CaptionsSpec.of(captions),
            **content,
        )
        _require_plausible(manifest, path)
        return manifest

    def require(self, expected: LatentSpec, folder: Path | str) -> None:
        """Raise ValueError unless these shards match the description in the config.

        Shards with both orientations also match a config without flips.
        """
        differences = [
            difference
            for difference in self.spec.differences(expected)
            if not (difference.startswith("flip ") and self.spec.flip)
        ]
        if differences:
            raise ValueError(
                f"The shards in {folder} disagree with the config: {'; '.join(differences)} as configured; "
                "point data.shards to other shards, or encode these again."
            )


def embeddings_name(shard: str) -> str:
    """Return the name of the file beside a shard with the embeddings of its captions."""
    return f"{shard.removesuffix('.tar')}-text.npz"


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields without those that are None, as earlier versions, which did not have them, wrote records."""
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if value is not None
    }


def _content(folder: Path | str, path: str, retry: Retry) -> bytes:
    try:
        if is_remote(folder):
            return read_bytes(path, retry, MAX_MANIFEST_BYTES)
        return read_regular(inside(Path(folder), MANIFEST_NAME, FORMAT), MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"There is no {MANIFEST_NAME} in {folder}; make shards with `ditscale encode`.") from error
    except DamagedError as error:
        raise DamagedFileError(str(error)) from error


def _require_plausible(manifest: Manifest, path: str) -> None:
    """Raise ValueError where parts of a manifest contradict each other, or a shard's name in it is invalid."""
    for shard in manifest.shards:
        if _SHARD_NAME.fullmatch(plain_name(shard.name, path)) is None:
            raise DamagedFileError(f"{path} is damaged: {shard.name!r} is not a shard's name.")
    if len({shard.name for shard in manifest.shards}) < len(manifest.shards):
        raise DamagedFileError(f"{path} is damaged: it lists a shard twice.")
    for fault in _contradictions(manifest):
        raise DamagedFileError(f"{path} is damaged: {fault}.")


def _contradictions(manifest: Manifest) -> Iterator[str]:
    spec = manifest.spec
    if spec.image_size % spec.downscale:
        yield f"spec.image_size {spec.image_size} is not a multiple of spec.downscale {spec.downscale}"
    if len(manifest.class_names) != spec.num_classes:
        yield f"it has {len(manifest.class_names)} class_names, but spec.num_classes is {spec.num_classes}"
    statistics = (("latent_mean", manifest.latent_mean), ("latent_std", manifest.latent_std))
    for name, values in (*statistics, ("spec.scale", spec.scale), ("spec.shift", spec.shift)):
        if isinstance(values, list) and len(values) != spec.channels:
            yield f"{name} has {len(values)} numbers, but spec.channels is {spec.channels}"
    if manifest.num_samples == 0:
        yield "it has no sample"
    if manifest.captions is not None and manifest.captions.count < manifest.num_samples:
        yield f"captions.count is {manifest.captions.count}, but there are {manifest.num_samples} samples"
    tokens = manifest.captions and manifest.captions.tokens
    if manifest.captions and tokens and tokens.num_truncated > manifest.captions.count:
        yield f"{tokens.num_truncated} captions are truncated, but there are {manifest.captions.count}"
    if tokens and tokens.embeddings is not None:
        yield from _contradictions_of_embeddings(manifest, tokens.encoder)
    sample_bytes = spec.sample_bytes + (manifest.teacher.sample_bytes(spec) if manifest.teacher else 0)
    for shard in manifest.shards:
        if shard.count * sample_bytes > shard.bytes:
            yield f"{shard.name!r} has {shard.count} samples of {sample_bytes} bytes, but {shard.bytes} bytes"


def _contradictions_of_embeddings(manifest: Manifest, encoder: TextSpec) -> Iterator[str]:
    files, wanted = manifest.embeddings, [embeddings_name(shard.name) for shard in manifest.shards]
    if [file.name for file in files] != wanted:
        yield f"its {len(files)} files of embeddings are not {wanted[0]!r} and so on, one for each shard"
    assert manifest.captions is not None
    if (count := sum(file.count for file in files)) != manifest.captions.count:
        yield f"it has embeddings of {count} captions, but there are {manifest.captions.count}"
    for file in files:
        if file.count * encoder.caption_bytes > file.bytes:
            yield f"{file.name!r} has {file.count} captions of {encoder.caption_bytes} bytes, but {file.bytes} bytes"
