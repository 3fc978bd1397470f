"""Shards store token ids of captions and the empty caption's embedding, which are those of the text encoder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import InProcess, PatternSource, encode_pattern, silent_progress
from small_text_encoders import LENGTH, write_small_clip, write_small_t5
from test_caption_shards import Described
from test_shard_damage import DAMAGES, in_time
from test_shards import contents

from core.npz import write_npz
from core.reading import sha256_of
from data.captions import Captioned, Templates
from data.encode import Workers
from data.manifest import Manifest
from data.shards import MappedShards
from data.text_encoders import CLIPText, T5Text, TextEncoder
from data.verify import files_of, verify

LONG = "a drawing of a digit of the number three of the number seven"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> CLIPText:
    return CLIPText(str(write_small_clip(tmp_path_factory.mktemp("clip") / "clip")))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> T5Text:
    return T5Text(str(write_small_t5(tmp_path_factory.mktemp("t5") / "t5")), length=10)


def source() -> Captioned:
    return Captioned(PatternSource(), Templates(["{name}", "a drawing of the {name}", LONG]))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, clip: CLIPText) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    encode_pattern(folder, source(), text=clip)
    return folder


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_ids_and_the_empty_caption_are_the_encoders(tmp_path: Path, request: Any, kind: str) -> None:
    encoder: TextEncoder = request.getfixturevalue(kind)
    manifest = encode_pattern(tmp_path, source(), text=encoder)
    shards = MappedShards(tmp_path)
    for row in (49, *range(50)):
        expected, found = encoder.tokenize(shards.captions_of(row)), shards.tokens_of(row)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.mask, expected.mask)
        assert found.ids.dtype == np.int32
    assert shards.manifest == manifest
    assert manifest.captions.tokens.encoder == encoder.spec()
    ids, mask, _ = encoder.tokenize([""])
    expected_empty = encoder.encode(torch.from_numpy(ids), torch.from_numpy(mask))
    empty = shards.empty_caption
    torch.testing.assert_close(torch.from_numpy(empty.tokens).float(), expected_empty.tokens[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.from_numpy(empty.pooled).float(), expected_empty.pooled[0], atol=1e-3, rtol=1e-3)
    np.testing.assert_array_equal(empty.mask, mask[0])
    assert (empty.tokens.dtype, empty.pooled.dtype) == (np.float16, np.float16)
    assert verify(tmp_path, silent_progress)[1] == []


def test_truncated_captions_are_counted_in_the_manifest(sound: Path) -> None:
    captions = Manifest.load(sound).captions
    assert captions is not None
    assert captions.tokens is not None
    assert (captions.count, captions.tokens.num_truncated) == (150, 50)  # the third template alone is too long
    shards = MappedShards(sound)
    assert [len(shards.tokens_of(row).ids) for row in range(50)] == [3] * 50
    assert shards.tokens_of(0).mask[2].all()
    assert shards.tokens_of(0).ids.shape[1] == LENGTH


def test_ids_leave_texts_and_shards_as_they_are(tmp_path: Path, sound: Path) -> None:
    manifest = encode_pattern(tmp_path, source())
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == {
        path.name: path.read_bytes() for path in sound.glob("*.tar")
    }
    one, two = MappedShards(tmp_path), MappedShards(sound)
    assert [one.captions_of(row) for row in range(50)] == [two.captions_of(row) for row in range(50)]
    assert "tokens" not in (tmp_path / "manifest.json").read_text()
    assert manifest.hash != two.manifest.hash
    for read in (lambda: one.tokens_of(0), lambda: one.empty_caption):
        with pytest.raises(ValueError, match=r"have no token ids; encode images with captions and a data/text_encoder"):
            read()


def test_parallel_repeated_and_stopped_encodings_give_the_same_bytes(
    tmp_path: Path, sound: Path, clip: CLIPText
) -> None:
    for rank in (1, 0):
        encode_pattern(tmp_path / "many", source(), text=clip, workers=Workers(rank, 2))
    assert contents(tmp_path / "many") == contents(sound)
    shutil.copytree(sound, tmp_path / "stopped")
    for name in ("manifest.json", "empty_caption.npz"):
        (tmp_path / "stopped" / name).unlink()
    encode_pattern(tmp_path / "stopped", source(), text=clip)
    assert contents(tmp_path / "stopped") == contents(sound)


def test_another_encoder_and_images_without_captions_are_refused(tmp_path: Path, sound: Path, t5: T5Text) -> None:
    found, given = Manifest.load(sound).captions.tokens.encoder.revision, t5.spec().revision  # type: ignore
    with pytest.raises(ValueError, match=f"the text encoder is clip_text {found} .* and not t5 {given} .*; encode"):
        encode_pattern(sound, source(), text=t5)
    with pytest.raises(ValueError, match=r"the text encoder is clip_text .* and not none; encode into another data.sh"):
        encode_pattern(sound, source())
    with pytest.raises(ValueError, match=r"A text encoder is given, but pattern-\d+ has no caption; set data/text"):
        encode_pattern(tmp_path, text=t5)


def test_captions_in_any_script_have_ids(tmp_path: Path, clip: CLIPText) -> None:
    encode_pattern(tmp_path, Described(), text=clip, max_skipped_fraction=0.1)
    shards = MappedShards(tmp_path)
    for row in range(49):
        np.testing.assert_array_equal(shards.tokens_of(row).ids, clip.tokenize(shards.captions_of(row)).ids)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_the_empty_caption_is_named_and_mended(
    sound: Path, tmp_path: Path, clip: CLIPText, damage: str
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    DAMAGES[damage](folder / "empty_caption.npz")
    read = in_time(lambda: MappedShards(folder).empty_caption)
    assert isinstance(read, ValueError)
    assert "empty_caption.npz" in str(read)
    assert [found.file for found in in_time(lambda: verify(folder, silent_progress))[1]] == ["empty_caption.npz"]
    again = in_time(lambda: encode_pattern(folder, source(), text=clip))
    if isinstance(again, ValueError):
        assert "empty_caption.npz is a folder" in str(again)
        (folder / "empty_caption.npz").rmdir()
        encode_pattern(folder, source(), text=clip)
    assert contents(folder) == contents(sound)


Arrays = dict[str, np.ndarray]


def written(folder: Path, name: str, change: Callable[[Arrays], object]) -> None:
    """Change the arrays of a file, and put its hash and size into the manifest."""
    with np.load(folder / name) as content:
        arrays = {array: content[array].copy() for array in content.files}
    change(arrays)
    write_npz(folder / name, arrays)
    captions = Manifest.load(folder).captions
    assert captions is not None
    assert captions.tokens is not None
    sha256, size = sha256_of(folder / name), (folder / name).stat().st_size
    if name == "captions.npz":
        stated = replace(captions, sha256=sha256, bytes=size)
    else:
        stated = replace(captions, tokens=replace(captions.tokens, empty_sha256=sha256))
    replace(Manifest.load(folder), captions=stated).save(folder)


CHANGES: dict[str, tuple[str, Callable[[Arrays], object]]] = {
    "ids below zero": ("captions.npz", lambda arrays: arrays["token_id"].__setitem__((0, 0), -1)),
    "ids of another length": ("captions.npz", lambda arrays: arrays.update(token_id=arrays["token_id"][:, 1:])),
    "ids of another type": ("captions.npz", lambda arrays: arrays.update(token_id=arrays["token_id"].astype("<i8"))),
    "ids too few": ("captions.npz", lambda arrays: arrays.update(token_id=arrays["token_id"][1:])),
    "no ids": ("captions.npz", lambda arrays: arrays.pop("token_id")),
    "no tokens": ("captions.npz", lambda arrays: arrays["num_tokens"].__setitem__(0, 0)),
    "more tokens than there are": ("captions.npz", lambda arrays: arrays["num_tokens"].__setitem__(0, LENGTH + 1)),
    "an empty caption of another shape": (
        "empty_caption.npz",
        lambda arrays: arrays.update(tokens=arrays["tokens"][:, 1:]),
    ),
    "an empty caption of another type": (
        "empty_caption.npz",
        lambda arrays: arrays.update(mask=arrays["mask"].astype(np.uint8)),
    ),
    "an empty caption that is not finite": (
        "empty_caption.npz",
        lambda arrays: arrays["pooled"].__setitem__(0, np.nan),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_manifest_vouches_for_is_still_checked(sound: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    name, how = CHANGES[change]
    written(folder, name, how)
    shards = MappedShards(folder)
    with pytest.raises(ValueError, match=rf"{name} is damaged: .*; run the same `ditscale encode` again"):
        _ = [shards.tokens_of(row) for row in range(50)], shards.empty_caption
    assert name in {found.file for found in verify(folder, silent_progress)[1]}


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: tokens.update(num_truncated=151),
        lambda tokens: tokens.update(empty_sha256="../x"),
        lambda tokens: tokens["encoder"].update(length=0),
        lambda tokens: tokens["encoder"].update(precision="fp16"),
        lambda tokens: tokens["encoder"].update(url="http://x"),
        lambda tokens: tokens.pop("encoder"),
    ],
)
def test_a_manifest_of_another_form_is_refused(sound: Path, tmp_path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads((sound / "manifest.json").read_text())
    del content["record_sha256"]
    change(content["captions"]["tokens"])
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest.json is damaged: .*; delete it and run"):
        Manifest.load(tmp_path)


def test_the_command_stores_ids_says_what_is_truncated_and_repairs(in_process: InProcess) -> None:
    write_small_clip(Path("clip"))
    words = ["data=digits", "data/captions=digits", "data.shards=shards", "data/text_encoder=clip"]
    assert "text_encoder.folder is missing; give it" in in_process("encode", *words, expect=2)
    words += ["text_encoder.folder=clip", f"captions.templates=[digit,{LONG!r}]"]
    shown = in_process("encode", *words)
    assert f"3594 captions, 1797 of them truncated to the {LENGTH} tokens of clip_text" in shown
    before = contents(Path("shards"))
    assert {"captions.npz", "empty_caption.npz"} <= set(files_of(Path("shards"), Manifest.load("shards")))
    Path("shards/empty_caption.npz").unlink()
    assert "empty_caption.npz is missing" in in_process("verify", "data.shards=shards", expect=2)
    assert "match the manifest" in in_process("verify", "data.shards=shards", "repair=true")
    assert contents(Path("shards")) == before
