"""Encode captions by a frozen text encoder of transformers: CLIP's, or the encoder of a T5.

A folder is read as untrusted files (`data.pretrained`). Of the tokenizer, its class is chosen here and only its tables
are read; its hash is part of the encoder's identity.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from core.precision import exact_float32
from core.reading import DamagedFileError, sha256_of
from data.manifest import TextSpec
from data.pretrained import built, read_config, read_weights, require_files, require_heads, transformers_for

Precision = Literal["fp32", "bf16"]
Size = Annotated[int, Field(ge=1, le=2**20)]
Id = Annotated[int, Field(ge=0, le=2**24)]
_MOST_LENGTH = 2**12


class Tokenized(NamedTuple):
    """Captions as a text encoder takes them."""

    ids: NDArray[np.int32]  # [B, M], padded
    mask: NDArray[np.bool_]  # [B, M], False at padding
    num_truncated: int  # captions that were longer than M tokens


class EncodedText(NamedTuple):
    """Captions as a network is conditioned on them."""

    tokens: Tensor  # [B, M, D] float32
    mask: Tensor  # [B, M] bool, False at padding
    pooled: Tensor  # [B, P] float32


class TextEncoder(Protocol):
    """A frozen network that represents captions."""

    @property
    def network(self) -> nn.Module:
        """Return the frozen network."""
        ...

    def spec(self) -> TextSpec:
        """Return the identity of the encoder and the shape of what it gives."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the weights, after reading them where they are not in memory yet. Raises ValueError for damaged ones."""
        ...

    def tokenize(self, captions: Sequence[str]) -> Tokenized:
        """Return the token ids of captions, truncated and padded to the encoder's length."""
        ...

    def encode(self, ids: Tensor, mask: Tensor) -> EncodedText:
        """Return what a network is conditioned on, for ids [B, M] and their mask [B, M], on their device."""
        ...


class _Text:
    """The common part of the encoders: a tokenizer, a network, and how both are used.

    ``load`` returns the network. It is called when the network is first used: a process that only asks which encoder
    it is, or for token ids, has no weights in memory.
    """

    name: str

    def __init__(
        self,
        tokenizer: Any,
        load: Callable[[], nn.Module],
        hash_: str,
        layer: str,
        length: int,
        dim: int,
        precision: Precision,
    ) -> None:
        self._tokenizer, self._load = tokenizer, load
        self._spec = TextSpec(self.name, f"sha256:{hash_}", layer, precision, length, dim, dim)

    @cached_property
    def network(self) -> nn.Module:
        """The frozen network. Raises ValueError for damaged weights."""
        return self._load().eval().requires_grad_(False)

    def spec(self) -> TextSpec:
        """Return name and hash of the encoder, and the shape of what it gives."""
        return self._spec

    def to(self, device: torch.device) -> None:
        """Move the weights, after reading them where they are not in memory yet. Raises ValueError for damaged ones."""
        self.network.to(device)

    def tokenize(self, captions: Sequence[str]) -> Tokenized:
        """Return ids [B, M] int32 of captions and their mask, truncated and padded to the encoder's length."""
        ids, mask, truncated = token_ids(self._tokenizer, captions, self._spec.length)
        return Tokenized(ids, mask, int(truncated.sum()))

    @torch.no_grad()
    def encode(self, ids: Tensor, mask: Tensor) -> EncodedText:
        """Return tokens [B, M, D], mask and pooled vector [B, P] of ids [B, M] and their mask [B, M]."""
        with exact_float32(ids.device):
            tokens, pooled = self._outputs(ids.long(), mask)
        return EncodedText(tokens.float(), mask, pooled.float())

    def _outputs(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class CLIPText(_Text):
    """CLIP's text encoder, as latent diffusion uses it: 77 tokens, the pooled vector at the end of the caption.

    ``folder`` has ``config.json``, the weights and the tokenizer's ``vocab.json`` and ``merges.txt`` (or
    ``tokenizer.json``), or the tokenizer is in the folder ``tokenizer``. ``layer`` is ``last``, after the last norm
    (Stable Diffusion 1), or ``penultimate``, before the last block and without the norm (Stable Diffusion XL). The
    encoder is causal: padding does not change the tokens before it. Raises ValueError where the folder is not whole.
    The weights are read when they are first needed, or by `to`.
    """

    name = "clip_text"

    def __init__(
        self,
        folder: str | None,
        tokenizer: str | None = None,
        layer: Literal["last", "penultimate"] = "last",
        precision: Precision = "fp32",
    ) -> None:
        folder = _given(folder)
        _require_one_of("layer", layer, ("last", "penultimate"))
        _require_one_of("precision", precision, ("fp32", "bf16"))
        transformers = transformers_for("A text encoder")
        config, *weights = require_files(folder, "CLIP", _remedy("openai/clip-vit-large-patch14"))
        kinds = {"clip_text_model": None, "clip": "text_config"}
        shape = read_config(config, CLIPTextShape, kinds, "CLIP text encoder")
        require_heads(config, shape.hidden_size, shape.num_attention_heads)

        def load() -> nn.Module:
            tensors = _of_text(read_weights(weights, "CLIP"))
            made = transformers.CLIPTextConfig(**asdict(shape))
            return built(transformers.CLIPTextModel, made, tensors, weights[0], "CLIP", dtype=_DTYPES[precision])

        table = read_tokenizer(transformers.CLIPTokenizer, tokenizer or folder, shape.vocab_size, _TOKENIZER)
        hash_ = _hash_of([config, *weights], table)
        length = shape.max_position_embeddings
        super().__init__(table, load, hash_, layer, length, shape.hidden_size, precision)

    def _outputs(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        penultimate = self._spec.layer == "penultimate"
        found = self.network(input_ids=ids, output_hidden_states=penultimate)
        return found.hidden_states[-2] if penultimate else found.last_hidden_state, found.pooler_output


class T5Text(_Text):
    """The encoder of a T5, as PixArt-alpha uses it: ``length`` tokens, and their mean as the pooled vector.

    ``folder`` has ``config.json``, the weights, which may be several files, and the tokenizer's ``tokenizer.json`` or
    ``spiece.model``, or the tokenizer is in the folder ``tokenizer``. Raises ValueError where it is not whole. The
    weights are read when they are first needed, or by `to`.
    """

    name = "t5"

    def __init__(
        self, folder: str | None, tokenizer: str | None = None, length: int = 120, precision: Precision = "fp32"
    ) -> None:
        folder = _given(folder)
        _require_one_of("precision", precision, ("fp32", "bf16"))
        if not 1 <= length <= _MOST_LENGTH:
            raise ValueError(
                f"text_encoder.length is {length}, but it must be from 1 to {_MOST_LENGTH}; PixArt-alpha has 120."
            )
        transformers = transformers_for("A text encoder")
        config, *weights = require_files(folder, "T5", _remedy("google/t5-v1_1-xxl"))
        shape = read_config(config, _T5Shape, {"t5": None}, "T5")

        def load() -> nn.Module:
            tensors = {
                name: value
                for name, value in read_weights(weights, "T5").items()
                if name.startswith(("encoder.", "shared."))
            }
            made = transformers.T5Config(**asdict(shape))
            return built(transformers.T5EncoderModel, made, tensors, weights[0], "T5", dtype=_DTYPES[precision])

        table = read_tokenizer(transformers.T5Tokenizer, tokenizer or folder, shape.vocab_size, _TOKENIZER)
        super().__init__(table, load, _hash_of([config, *weights], table), "last", length, shape.d_model, precision)

    def _outputs(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # Added to scores. Of a mask [B, M] transformers would read from the device whether all of it is true.
        hidden = torch.zeros(mask.shape, dtype=_DTYPES[self._spec.precision], device=mask.device)
        hidden = hidden.masked_fill(~mask, torch.finfo(hidden.dtype).min)[:, None, None, :]
        tokens: Tensor = self.network(input_ids=ids, attention_mask=hidden).last_hidden_state
        kept = mask.unsqueeze(2)
        return tokens, tokens.float().where(kept, 0).sum(dim=1) / kept.sum(dim=1)


_TOKENIZER = "text_encoder.tokenizer"  # the setting that takes a folder
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CLIPTextShape:
    """The fields of a CLIP's ``config.json`` that determine what its text encoder gives; no others are used.

    Some versions of transformers leave out values that equal their defaults, which these are.
    """

    vocab_size: Size = 49408
    hidden_size: Size = 512
    intermediate_size: Size = 2048
    num_hidden_layers: Annotated[int, Field(ge=2, le=1000)] = 12
    num_attention_heads: Size = 8
    max_position_embeddings: Annotated[int, Field(ge=2, le=_MOST_LENGTH)] = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    bos_token_id: Id = 49406
    eos_token_id: Id = 49407  # 2 in files of earlier versions: the largest id of a caption is then its end


@dataclass(frozen=True)
class _T5Shape:
    """The fields of a T5's ``config.json`` that determine what it gives; no others are used."""

    vocab_size: Size
    d_model: Size
    d_kv: Size
    d_ff: Size
    num_layers: Annotated[int, Field(ge=1, le=1000)]
    num_heads: Size
    relative_attention_num_buckets: Size
    feed_forward_proj: Literal["relu", "gated-gelu"]
    layer_norm_epsilon: Annotated[float, Field(gt=0, le=1)]
    relative_attention_max_distance: Size = 128


def _of_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of CLIP's text encoder; the published files have its name before each, beside the images'."""
    prefix = "text_model."
    if not any(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def read_tokenizer(tokenizer_class: Any, folder: str, vocab_size: int, setting: str) -> Any:
    """Return the tokenizer in a folder, or in the folder ``tokenizer`` beside it or in it.

    Raises ValueError where there is none, naming the ``setting`` that takes its folder, or where it has ids that the
    network does not embed.
    """
    here = Path(folder)
    candidates = [here, here / "tokenizer", here.parent / here.name.replace("text_encoder", "tokenizer")]
    files = ("tokenizer.json", "vocab.json", "spiece.model")
    found = next((place for place in candidates if any((place / name).is_file() for name in files)), None)
    if found is None:
        raise ValueError(
            f"There is no tokenizer in {folder} ({', '.join(files)}); copy it there, or name its folder by "
            f"{setting}=PATH."
        )
    try:
        table = tokenizer_class.from_pretrained(str(found), local_files_only=True)
        largest = max(table.get_vocab().values())
    except Exception as error:  # parsers of several formats, which raise errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{found} does not hold a readable tokenizer ({reason}); copy it again.") from None
    if largest >= vocab_size:
        raise DamagedFileError(
            f"{found} has the token id {largest}, but the network embeds {vocab_size}; copy both from one model."
        )
    return table


def token_ids(
    tokenizer: Any, captions: Sequence[str], length: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return ids [B, ``length``] of captions, padded, their mask, and which captions [B] were longer and truncated."""
    if not captions:  # which tokenizers refuse
        return np.empty((0, length), np.int32), np.empty((0, length), np.bool_), np.empty(0, np.bool_)
    found = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="np")
    mask = found["attention_mask"].astype(np.bool_)
    truncated = mask.all(axis=1)  # of these, the whole caption says it
    if full := [caption for caption, is_full in zip(captions, truncated, strict=True) if is_full]:
        whole = tokenizer(full, verbose=False)["input_ids"]  # without a warning of their length
        truncated[truncated] = [len(ids) > length for ids in whole]
    return found["input_ids"].astype(np.int32), mask, truncated


def hash_of_tables(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's tables as transformers holds them."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _hash_of(files: Sequence[Path], tokenizer: Any) -> str:
    """Return the SHA-256 of the files and of the tokenizer's tables."""
    parts = [*map(sha256_of, files), hash_of_tables(tokenizer)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _given(folder: str | None) -> str:
    if not folder:
        raise ValueError("text_encoder.folder is missing; give it as text_encoder.folder=PATH.")
    return folder


def _require_one_of(name: str, value: str, values: Sequence[str]) -> None:
    if value not in values:
        raise ValueError(f"text_encoder.{name} is {value!r}, but it must be {' or '.join(values)}.")


def _remedy(page: str) -> str:
    return f"copy config.json, the weights and the tokenizer from its page on the hub ({page}) into one folder."
