"""Fit a run that is conditioned on text to the captions and the text encoder of its shards."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from data.manifest import Manifest
from data.settings import DataSettings
from data.shards import open_shards
from evaluation.recognition import MOST_PROMPTS

_NUM_PROMPTS = 10  # of the shards' captions, where none are given
_LONGEST_PROMPT = 1000  # characters
_WAY_OUT = "encode images with captions and a data/text_encoder, or choose another data/condition"


class TextSizes(NamedTuple):
    """The shape of what a text encoder gives."""

    length: int  # M
    dim: int  # D
    pooled_dim: int  # P


def fill_condition(section: Mapping[str, Any], manifest: Manifest, data: DataSettings) -> dict[str, Any]:
    """Return the condition's section with the settings of text that follow from the shards; others have none.

    Raises ValueError where the shards lack what it needs, or where it gives another value.
    """
    if "encoder" not in section:
        return dict(section)
    if manifest.captions is None or manifest.captions.tokens is None:
        lacks = "no captions" if manifest.captions is None else "captions without token ids"
        raise ValueError(f"data/condition=text needs token ids of captions, but {data.shards} has {lacks}; {_WAY_OUT}.")
    tokens = manifest.captions.tokens
    spec, has_embeddings = tokens.encoder, bool(manifest.embeddings)
    if section["stored"] and not has_embeddings:
        raise ValueError(
            f"condition.stored is true, but {data.shards} has no embeddings of captions; encode with "
            "text_embeddings=true, or set condition.stored=false."
        )
    facts = {"encoder": str(spec), "length": spec.length, "dim": spec.dim, "pooled_dim": spec.pooled_dim}
    for name, found in facts.items():
        if section[name] not in (None, found):
            raise ValueError(
                f"condition.{name} is {section[name]}, but the captions of {data.shards} have {found}; leave it out, "
                "or point data.shards to other shards."
            )
    stored = has_embeddings if section["stored"] is None else section["stored"]
    for text in section["prompts"] or ():
        if isinstance(text, str) and not _may_be_saved(text):
            raise ValueError(
                f"condition.prompts has {text[:80]!r}, which a run's config cannot hold; give it in one line, of at "
                f"most {_LONGEST_PROMPT} characters and without '${{'."
            )
    prompts = _some_captions(manifest, data) if section["prompts"] is None else section["prompts"]
    held_out = _held_out(section, data)
    return {**section, **facts, "stored": stored, "prompts": prompts, "held_out": held_out}


def _held_out(section: Mapping[str, Any], data: DataSettings) -> list[str] | None:
    """Return the prompts that no caption of the shards equals, in their order; None unless they are counted each.

    Raises ValueError where the section has others.
    """
    prompts, given = section["prompts"], section["held_out"]
    if prompts is None or section["prompt_classes"] is None or len(prompts) > MOST_PROMPTS:
        return given
    shards = open_shards(data.shards, False, data.cache, data.cache_bytes)  # the batches' shards are verified
    unseen = dict.fromkeys(prompts)
    try:
        for row in range(len(shards)):
            for caption in shards.captions_of(row):
                unseen.pop(caption, None)
    finally:
        shards.close()
    if given is not None and set(given) != unseen.keys():
        wrong = next(iter(set(given) ^ unseen.keys()))
        raise ValueError(
            f"condition.held_out has {len(given)} prompts, but {len(unseen)} are no captions of {data.shards}, and "
            f"only one of the two has {wrong!r}; leave it out."
        )
    return list(unseen)


def _some_captions(manifest: Manifest, data: DataSettings) -> list[str]:
    """Return the first captions of rows that are spread over the shards, without repetitions."""
    shards = open_shards(data.shards, data.verify_checksums, data.cache, data.cache_bytes)
    found: list[str] = []
    try:
        rows = range(0, manifest.num_samples, max(1, manifest.num_samples // (4 * _NUM_PROMPTS)))
        for row in rows:
            caption = shards.captions_of(row)[0]
            if _may_be_saved(caption) and caption not in found and len(found) < _NUM_PROMPTS:
                found.append(caption)
    finally:
        shards.close()
    return found


def _may_be_saved(text: str) -> bool:
    """Return whether the config of a run can have a text: its readers refuse interpolations and control characters."""
    return len(text) <= _LONGEST_PROMPT and text.isprintable() and "${" not in text


def sizes_in(condition: Mapping[str, Any]) -> TextSizes | None:
    """Return the sizes in a condition's section that `fill_condition` filled, or None where it is not of text."""
    if "encoder" not in condition:
        return None
    return TextSizes(condition["length"], condition["dim"], condition["pooled_dim"])


def fill_text(model: Mapping[str, Any], sizes: TextSizes | None) -> dict[str, Any]:
    """Return the model's section with the sizes of a text encoder, where it leaves them open.

    Raises ValueError where it gives others, or leaves them open and there are none.
    """
    embedding = model.get("embedding")
    of_embedding = embedding if isinstance(embedding, Mapping) else {}
    is_unet = "context_length" in model  # the context of an LDM is a label
    if sizes is None:
        values = [model["context_dim"] if is_unet else 0, *(of_embedding.get(name, 0) for name in TextSizes._fields)]
        if None in values:
            raise ValueError(
                "The network is conditioned on text, whose sizes follow from the captions' text encoder, but "
                "data/condition is not text; set data/condition=text."
            )
        return dict(model)
    of_unet = {"context_length": sizes.length, "context_dim": sizes.dim} if is_unet else {}
    filled = _filled(model, of_unet, "model")
    if of_embedding:
        filled["embedding"] = _filled(of_embedding, sizes._asdict(), "model.embedding")
    return filled


def _filled(section: Mapping[str, Any], sizes: Mapping[str, int], place: str) -> dict[str, Any]:
    filled = dict(section)
    for name, found in sizes.items():
        if name not in filled or (name == "pooled_dim" and filled[name] == 0):  # 0: the pooled vector is not used
            continue
        if filled[name] not in (None, found):
            raise ValueError(
                f"{place}.{name} is {filled[name]}, but that of the shards' text encoder is {found}; leave it out, or "
                "point data.shards to other shards."
            )
        filled[name] = found
    return filled
