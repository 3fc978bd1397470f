"""Captions become the ids and the embeddings that transformers itself computes, and damaged folders are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_text_encoders import LENGTH, write_small_clip, write_small_t5

from data.text_encoders import CLIPText, EncodedText, T5Text, TextEncoder

CAPTIONS = ["a drawing of a three", "The digit  SEVEN", "", "a number a number and a number of a number of numbers"]
Loaded = Callable[..., TextEncoder]


def small_clip(folder: str, **settings: Any) -> TextEncoder:
    return CLIPText(folder, **settings)


def small_t5(folder: str, **settings: Any) -> TextEncoder:
    return T5Text(folder, **{"length": 9, **settings})


BOTH = [(write_small_clip, small_clip), (write_small_t5, small_t5)]
both = pytest.mark.parametrize(("write", "load"), BOTH, ids=["clip", "t5"])
Write = Callable[..., Path]


def encoded(encoder: TextEncoder, captions: list[str]) -> EncodedText:
    found = encoder.tokenize(captions)
    return encoder.encode(torch.from_numpy(found.ids), torch.from_numpy(found.mask))


@both
def test_token_ids_and_masks_are_those_of_transformers(tmp_path: Path, write: Write, load: Loaded) -> None:
    from transformers import CLIPTokenizer, T5Tokenizer

    encoder = load(str(write(tmp_path)))
    length = encoder.spec().length
    tokenizer_class = CLIPTokenizer if encoder.spec().name == "clip_text" else T5Tokenizer
    theirs = tokenizer_class.from_pretrained(tmp_path)(
        CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    ours = encoder.tokenize(CAPTIONS)
    assert ours.ids.dtype == np.int32
    np.testing.assert_array_equal(ours.ids, theirs["input_ids"])
    np.testing.assert_array_equal(ours.mask, theirs["attention_mask"])
    assert ours.num_truncated == 1
    assert [row.sum() for row in ours.mask][2:] == [2 if encoder.spec().name == "clip_text" else 1, length]
    nothing = encoder.tokenize([])
    assert (nothing.ids.shape, nothing.mask.shape, nothing.num_truncated) == ((0, length), (0, length), 0)


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_clips_embeddings_are_those_of_transformers(tmp_path: Path, layer: Any) -> None:
    from transformers import CLIPTextModel

    encoder = CLIPText(str(write_small_clip(tmp_path)), layer=layer)
    ids = torch.from_numpy(encoder.tokenize(CAPTIONS).ids).long()
    with torch.no_grad():
        theirs = CLIPTextModel.from_pretrained(tmp_path)(ids, output_hidden_states=True)
    ours = encoded(encoder, CAPTIONS)
    assert torch.equal(ours.tokens, theirs.last_hidden_state if layer == "last" else theirs.hidden_states[-2])
    assert torch.equal(ours.pooled, theirs.pooler_output)
    end = torch.from_numpy(encoder.tokenize(CAPTIONS).mask).sum(1) - 1  # the pooled vector is that of the last token
    with torch.no_grad():
        torch.testing.assert_close(ours.pooled, theirs.last_hidden_state[torch.arange(4), end])


def test_t5s_embeddings_are_those_of_transformers_and_the_pooled_vector_is_their_mean(tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    encoder = T5Text(str(write_small_t5(tmp_path)), length=9)
    found = encoder.tokenize(CAPTIONS)
    ids, mask = torch.from_numpy(found.ids).long(), torch.from_numpy(found.mask)
    with torch.no_grad():
        theirs = T5EncoderModel.from_pretrained(tmp_path)(ids, attention_mask=mask.long()).last_hidden_state
    ours = encoded(encoder, CAPTIONS)
    assert torch.equal(ours.tokens, theirs)
    for row in range(4):
        torch.testing.assert_close(ours.pooled[row], theirs[row, mask[row]].mean(dim=0))


@both
def test_padding_changes_no_token_before_it_and_captions_do_not_touch_each_other(
    tmp_path: Path, write: Write, load: Loaded
) -> None:
    encoder = load(str(write(tmp_path)))
    found = encoder.tokenize(CAPTIONS)
    ids, mask = torch.from_numpy(found.ids), torch.from_numpy(found.mask)
    ours = encoder.encode(ids, mask)
    if encoder.spec().name == "t5":  # CLIP is causal, and pools at the end of the caption that comes first
        other = encoder.encode(torch.where(mask, ids, 5), mask)
        torch.testing.assert_close(other.tokens[mask], ours.tokens[mask])
        torch.testing.assert_close(other.pooled, ours.pooled)
    alone = encoder.encode(ids[1:2], mask[1:2])
    torch.testing.assert_close(alone.tokens, ours.tokens[1:2])
    shorter = encoder.encode(ids[1:2, :8], mask[1:2, :8])
    torch.testing.assert_close(shorter.tokens[mask[1:2, :8]], ours.tokens[1:2][mask[1:2]])
    torch.testing.assert_close(shorter.pooled, ours.pooled[1:2])


def test_the_published_layout_of_clip_with_images_and_the_name_of_earlier_versions_is_read(tmp_path: Path) -> None:
    """Check the layout of openai/clip-vit-large-patch14: both networks, names with text_model, a range of positions."""
    alone = write_small_clip(tmp_path / "alone")
    whole = shutil.copytree(alone, tmp_path / "whole")
    weights = {f"text_model.{name}": value for name, value in load_file(alone / "model.safetensors").items()}
    weights |= {"vision_model.embeddings.class_embedding": torch.ones(4), "logit_scale": torch.tensor(2.6)}
    weights["text_model.embeddings.position_ids"] = torch.arange(LENGTH).unsqueeze(0)
    save_file(weights, whole / "model.safetensors")
    config = json.loads((alone / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": config}))
    one, other = (encoded(CLIPText(str(folder)), CAPTIONS) for folder in (alone, whole))
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.pooled, other.pooled)


def test_the_folders_of_a_pipeline_are_found_from_that_of_the_encoder(tmp_path: Path) -> None:
    folder = write_small_clip(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).rename(tmp_path / "tokenizer" / name)
    found, named = CLIPText(str(folder)), CLIPText(str(folder), tokenizer=str(tmp_path / "tokenizer"))
    assert found.spec() == named.spec()


def test_weights_in_several_files_are_those_of_one(tmp_path: Path) -> None:
    from transformers import T5ForConditionalGeneration

    one = write_small_t5(tmp_path / "one")
    several = shutil.copytree(one, tmp_path / "several")
    (several / "model.safetensors").unlink()
    T5ForConditionalGeneration.from_pretrained(one).save_pretrained(several, max_shard_size="10KB")
    assert len(list(several.glob("model-*.safetensors"))) > 2
    ours = [encoded(T5Text(str(folder), length=9), CAPTIONS) for folder in (one, several)]
    assert torch.equal(ours[0].tokens, ours[1].tokens)
    index = several / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        T5Text(str(several))


@both
def test_bf16_is_near_fp32_and_another_identity(tmp_path: Path, write: Write, load: Loaded) -> None:
    folder = str(write(tmp_path))
    exact, rounded = load(folder), load(folder, precision="bf16")
    assert exact.spec() != rounded.spec()
    assert exact.spec().revision == rounded.spec().revision
    one, other = encoded(exact, CAPTIONS), encoded(rounded, CAPTIONS)
    assert other.tokens.dtype == torch.float32
    assert 0 < (one.tokens - other.tokens).abs().max() < 0.05 * one.tokens.abs().max()


@both
def test_the_identity_changes_with_a_weight_and_with_a_word_of_the_vocabulary(
    tmp_path: Path, write: Write, load: Loaded
) -> None:
    folder = write(tmp_path)
    before = load(str(folder)).spec()
    assert load(str(folder)).spec() == before
    file = next(folder / name for name in ("vocab.json", "tokenizer.json") if (folder / name).exists())
    text = file.read_text()
    file.write_text(text.replace("three", "throe"))
    if file.name == "vocab.json":
        (folder / "merges.txt").write_text((folder / "merges.txt").read_text().replace("thre e", "thro e"))
        (folder / "merges.txt").write_text((folder / "merges.txt").read_text().replace("thr e", "thr o"))
        file.write_text(file.read_text().replace('"thre"', '"thro"'))
    assert load(str(folder)).spec().revision != before.revision
    write(folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.startswith("encoder.") and name.endswith("weight"))
    save_file({**weights, name: weights[name] + 1}, folder / "model.safetensors")
    assert load(str(folder)).spec().revision != before.revision


def damage(folder: Path, kind: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    content = json.loads(config.read_text())
    if kind == "no config":
        config.unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no tokenizer":
        for name in ("vocab.json", "tokenizer.json"):
            (folder / name).unlink(missing_ok=True)
    elif kind == "damaged tokenizer":
        for name in ("vocab.json", "tokenizer.json"):
            if (folder / name).exists():
                (folder / name).write_text("{")
    elif kind == "another model":
        config.write_text(json.dumps({**content, "model_type": "bert"}))
    elif kind == "a smaller vocabulary":
        config.write_text(json.dumps({**content, "vocab_size": 20}))
    elif kind == "heads that do not divide":
        heads = "num_attention_heads" if "num_attention_heads" in content else "num_heads"
        config.write_text(json.dumps({**content, heads: 3}))
    elif kind == "not finite":
        tensors = load_file(weights)
        name = next(iter(tensors))
        save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, weights)
    else:
        assert kind == "a wider network"
        width = "hidden_size" if "hidden_size" in content else "d_ff"
        config.write_text(json.dumps({**content, width: 1024}))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("no config", r"There is no .*config\.json; copy config\.json, the weights and the tokenizer from its page"),
        ("no weights", r"There is no .*model\.safetensors; copy"),
        ("cut weights", r"model\.safetensors does not hold a readable"),
        ("no tokenizer", r"There is no tokenizer in .*; copy it there, or name its folder by text_encoder\.tok"),
        ("damaged tokenizer", "does not hold a readable tokenizer"),
        ("another model", "is of a bert, not of a"),
        ("a smaller vocabulary", r"config asks for|token id \d+, but the network embeds 20"),
        ("heads that do not divide", r"hidden_size 16 is not a multiple of num_attention_heads 3|its config asks for"),
        ("not finite", "values that are not finite"),
        ("a wider network", r"its config asks for"),
    ],
)
@both
def test_a_folder_that_is_not_whole_is_refused_in_one_sentence(
    tmp_path: Path, write: Write, load: Loaded, kind: str, sentence: str
) -> None:
    damage(write(tmp_path), kind)
    with pytest.raises(ValueError, match=sentence) as refused:
        load(str(tmp_path)).to(torch.device("cpu"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda folder: CLIPText(folder, layer="first"),
            "text_encoder.layer is 'first', but it must be last or",
        ),
        (
            lambda folder: T5Text(folder, precision="fp16"),
            "text_encoder.precision is 'fp16', but it must be fp32 or",
        ),
        (lambda folder: T5Text(folder, length=0), "text_encoder.length is 0, but it must be from 1 to 4096; PixArt"),
    ],
)
def test_settings_that_do_not_exist_are_refused(tmp_path: Path, build: Callable[[str], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build(str(tmp_path))
