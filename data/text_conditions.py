"""Make the conditions of networks for text: captions of samples, and prompts of images to generate.

In training, a sample with several captions gets one of them on each visit, by a draw, and a dropped caption is the
empty one. Where the shards store no embeddings, batches have token ids, and the frozen encoder of the shards runs on
the devices as a part of the step; it rounds to float16 as stored embeddings are, so that both train the same run.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Size, Tensor

from core.batch import Condition
from core.draws import Philox, Purpose
from data.conditions import Place, Prompts, Samples
from data.shards import MappedShards
from data.text_encoders import EncodedText, TextEncoder
from model.text_embedding import MASK, POOLED, TOKENS

TOKEN_IDS = "text_ids"  # [B, M] int32, of captions that are encoded on the devices
_ROW, _CHOICE = "text_row", "text_choice"  # [B] int64: a stored embedding; row -1 is the empty caption
_PROMPT = "prompt"  # [B] int64, the number of an image's prompt
_MOST_PROMPTS, _MOST_CLASSES = 2**24, 2**31


class TextCondition:
    """A source of captions, by the text encoder ``encoder`` of ``length`` M, ``dim`` D and ``pooled_dim`` P.

    These four follow from the shards, as do ``prompts``, the texts of images to generate, where none are given;
    ``prompt_classes`` are the classes that a classifier should recognize their images as, and ``held_out`` are the
    prompts that no caption of the shards equals. ``stored`` says whether training reads embeddings from the shards,
    and not token ids. With ``attend_to_padding``, no token of a caption is masked, as in Stable Diffusion. It accepts
    the arguments of every source.

    Raises ValueError for prompts that are not texts, and classes that are not one for each.
    """

    num_classes = 0
    may_be_unread = frozenset({TOKENS, MASK, POOLED})

    def __init__(
        self,
        num_classes: int = 0,
        encoder: str | None = None,
        length: int | None = None,
        dim: int | None = None,
        pooled_dim: int | None = None,
        stored: bool | None = None,
        attend_to_padding: bool = False,
        prompts: Sequence[str] | None = None,
        prompt_classes: Sequence[int] | None = None,
        held_out: Sequence[str] | None = None,
    ) -> None:
        self._expected = encoder
        self._sizes = length, dim, pooled_dim
        self._stored = bool(stored)
        self._attend_to_padding = attend_to_padding
        self._prompts = checked_prompts(prompts or (), prompt_classes, "condition.prompts")
        self.held_out = (
            None if held_out is None else frozenset(checked_prompts(held_out, None, "condition.held_out").texts)
        )
        self._negative = ""
        self._place: Place | None = None
        self._read: Callable[[], TextEncoder] | None = None
        self._encoder: TextEncoder | None = None
        self._empty: EncodedText | None = None  # of the shards
        self._dropped: EncodedText | None = None  # on the devices

    @property
    def num_groups(self) -> int:
        """Return the number of prompts."""
        return len(self._prompts.texts)

    def prepare(self, place: Place, text_encoder: Callable[[], TextEncoder] | None) -> None:
        """Keep how to read the text encoder and to place it, which happens when it is first needed."""
        self._place, self._read = place, text_encoder

    @property
    def encoder(self) -> TextEncoder:
        """Return the text encoder on the devices. Raises ValueError where it is not given, or is another."""
        if self._encoder is None:
            assert self._place is not None, "prepare comes first"
            if self._read is None:
                raise ValueError(
                    "This model is conditioned on captions, whose text encoder is not given; give it as "
                    "data/text_encoder=clip text_encoder.folder=PATH (or t5)."
                )
            found = self._read()
            self._require(found)
            self._place(found.network)
            self._encoder = found
        return self._encoder

    def _require(self, found: TextEncoder) -> None:
        spec = found.spec()
        if self._expected is not None and str(spec) != self._expected:
            raise ValueError(
                f"text_encoder is {spec}, but the captions were tokenized for {self._expected}; give the folder "
                "and the settings of that encoder."
            )
        ours = spec.length, spec.dim, spec.pooled_dim
        if any(wanted not in (None, size) for wanted, size in zip(self._sizes, ours, strict=True)):
            raise ValueError(
                f"text_encoder gives {spec}, but the network takes tokens and vectors of {self._sizes}; give another."
            )

    def announce(self, shards: MappedShards) -> None:
        """Tell the shards that embeddings are read with each of them, or read the encoder that makes them in the step.

        Raises ValueError where there is none, or it is not that of the captions.
        """
        if self._stored:
            shards.use_embeddings()
        else:
            _ = self.encoder

    def of_samples(self, samples: Samples) -> Condition:
        """Return token ids and mask of one caption of each sample, or the places of their stored embeddings."""
        shards, rows = samples.shards, samples.rows
        chosen = (samples.uniform(Purpose.CAPTION) * shards.num_captions(rows)).astype(np.int64)
        if self._stored:
            return {_ROW: torch.from_numpy(rows), _CHOICE: torch.from_numpy(chosen)}
        found = shards.tokens_of_captions(rows, chosen)
        return {TOKEN_IDS: torch.from_numpy(found.ids), MASK: torch.from_numpy(found.mask)}

    def whole(self, condition: Condition, shards: MappedShards, x_0: Tensor) -> Condition:
        """Return the stored embeddings of the captions, float16; token ids stay as they are."""
        if not self._stored:
            return condition
        if self._empty is None:
            self._empty = EncodedText(*(torch.from_numpy(value).unsqueeze(0) for value in shards.empty_caption))
        row, choice = condition[_ROW].numpy(), condition[_CHOICE].numpy()
        kept = np.flatnonzero(row >= 0)
        found = shards.embeddings_of(row[kept], choice[kept])
        parts = []
        for null, values in zip(self._empty, found, strict=True):
            part = null.repeat(len(row), *[1] * (null.dim() - 1))
            part[torch.from_numpy(kept)] = torch.from_numpy(values)
            parts.append(part)
        return self._parts(EncodedText(*parts))

    def embedded(self, condition: Condition) -> Condition:
        """Return the embeddings of token ids, rounded to float16; others stay as they are."""
        if TOKEN_IDS not in condition:
            return condition
        return self._parts(self.encoder.encode(condition[TOKEN_IDS], condition[MASK]))

    def _parts(self, text: EncodedText) -> dict[str, Tensor]:
        mask = torch.ones_like(text.mask) if self._attend_to_padding else text.mask
        return {TOKENS: text.tokens.half(), MASK: mask, POOLED: text.pooled.half()}

    def seen(self, x_t: Tensor) -> dict[str, Size]:
        """Return the shapes of an encoded caption."""
        length, dim, pooled_dim = self._sizes
        if length is None or dim is None or pooled_dim is None:
            spec = self.encoder.spec()
            length, dim, pooled_dim = spec.length, spec.dim, spec.pooled_dim
        return {TOKENS: Size((length, dim)), MASK: Size((length,)), POOLED: Size((pooled_dim,))}

    def null(self, condition: Condition) -> Condition:
        """Return the empty caption, or the negative prompt, in the form of the condition's rows."""
        if _ROW in condition:
            return {name: torch.full_like(value, -1 if name == _ROW else 0) for name, value in condition.items()}
        if TOKEN_IDS in condition:
            ids, mask = self._null_tokens
            return {**condition, TOKEN_IDS: ids.expand_as(condition[TOKEN_IDS]), MASK: mask.expand_as(condition[MASK])}
        device = condition[MASK].device
        stored = self._empty if device.type == "cpu" and not self._negative else None
        parts = self._parts(stored or self._null_of(device))
        return {name: parts[name].expand_as(value) for name, value in condition.items()}

    def _null_of(self, device: torch.device) -> EncodedText:
        """Return the embedding of the null prompt on the devices, [1, ...], which is computed once."""
        if self._dropped is None:
            self._dropped = self.encoder.encode(*(value.to(device) for value in self._null_tokens))
        return self._dropped

    @cached_property
    def _null_tokens(self) -> tuple[Tensor, Tensor]:
        """The token ids [1, M] of the null prompt and their mask, on the host."""
        found = self.encoder.tokenize([self._negative])
        return torch.from_numpy(found.ids), torch.from_numpy(found.mask)

    def in_turn(self, num_images: int, num_groups: int | None = None) -> Condition:
        """Return the prompts in turn."""
        return self._of_prompts(np.arange(num_images) % min(num_groups or self.num_groups, self._required()))

    def random(self, num_images: int, seed: int) -> Condition:
        """Return uniformly drawn prompts."""
        philox, count = Philox(seed), self._required()
        drawn = (philox.at(index, Purpose.SAMPLE_LABEL).integers(count) for index in range(num_images))
        return self._of_prompts(np.fromiter(drawn, dtype=np.int64, count=num_images))

    def _required(self) -> int:
        """Return the number of prompts. Raises ValueError where there are none."""
        if not self._prompts.texts:
            raise ValueError(
                'This model is conditioned on texts; give them as prompts="..." or prompts=FILE.txt, and in training '
                "as condition.prompts=[...]."
            )
        return len(self._prompts.texts)

    def _of_prompts(self, numbers: NDArray[np.int64]) -> Condition:
        used, places = np.unique(numbers, return_inverse=True)
        found = self.encoder.tokenize([self._prompts.texts[number] for number in used])
        return {
            TOKEN_IDS: torch.from_numpy(found.ids[places]),
            MASK: torch.from_numpy(found.mask[places]),
            _PROMPT: torch.from_numpy(numbers),
        }

    def asked_for(
        self, labels: Sequence[Any], num_images: int, class_names: Sequence[str], knows_null: bool, asked: str
    ) -> Condition:
        """Raise ValueError: there are no classes to ask for."""
        raise ValueError(
            f'labels is given, but {asked} is conditioned on texts; give prompts="..." or prompts=FILE.txt.'
        )

    def prompted(self, prompts: Prompts | None, negative: str | None, asked: str) -> "TextCondition":
        """Return a source of these prompts and this negative prompt, by the same encoder."""
        other = copy.copy(self)
        if prompts is not None:
            other._prompts, other.held_out = prompts, None
        if negative is not None:
            other._negative, other._dropped = negative, None
            other.__dict__.pop("_null_tokens", None)
        return other

    def classes(self, condition: Condition) -> NDArray[np.int64] | None:
        """Return the classes of the prompts, where they are known."""
        if self._prompts.classes is None:
            return None
        classes: NDArray[np.int64] = np.array(self._prompts.classes, np.int64)[condition[_PROMPT].numpy()]
        return classes

    def texts(self, condition: Condition) -> list[str]:
        """Return the prompts."""
        return [self._prompts.texts[number] for number in condition[_PROMPT].tolist()]

    def first_texts(self, most: int) -> list[str]:
        """Return the first prompts, ``most`` of them or fewer."""
        return list(self._prompts.texts[:most])

    def notes(self, condition: Condition) -> list[str]:
        """Return a sentence on the prompts that the encoder truncates, if there are any."""
        texts = [*dict.fromkeys(filter(None, [*self.texts(condition), self._negative]))]
        count, spec = self.encoder.tokenize(texts).num_truncated, self.encoder.spec()
        if not count:
            return []
        are = f"prompt{'s' * (len(texts) > 1)} {'is' if count == 1 else 'are'}"
        return [f"{count} of {len(texts)} {are} longer than the {spec.length} tokens of {spec.name}, and truncated."]


def checked_prompts(texts: Sequence[Any], classes: Sequence[int] | None, of: str) -> Prompts:
    """Return prompts. Raises ValueError, naming the setting ``of``, for what is no text, and for as many classes."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{of} has {text!r}, which is not a text; put it into quotation marks.")
        if not _is_unicode(text):
            raise ValueError(f"{of} has {text[:80]!r}, which is not text in Unicode; correct it.")
    if len(texts) > _MOST_PROMPTS:
        raise ValueError(f"{of} has {len(texts)} texts, but there may be {_MOST_PROMPTS}; give fewer.")
    if classes is not None and len(classes) != len(texts):
        raise ValueError(f"{of} has {len(texts)} texts, but {len(classes)} classes; give one class for each text.")
    if classes is not None and not all(0 <= number < _MOST_CLASSES for number in classes):
        wrong = next(number for number in classes if not 0 <= number < _MOST_CLASSES)
        raise ValueError(f"{of} has the class {wrong}, but classes are from 0 to {_MOST_CLASSES - 1}; give another.")
    return Prompts(tuple(texts), None if classes is None else tuple(classes))


def _is_unicode(text: str) -> bool:
    """Return whether a text can be stored: half of a pair of surrogates, which JSON allows, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
