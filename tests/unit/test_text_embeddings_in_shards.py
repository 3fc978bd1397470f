"""Shards store the embeddings of all captions by option: they are the text encoder's, whole, and read by row."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import InProcess, PatternSource, encode_pattern, silent_progress
from faulty_server import FaultyServer
from small_text_encoders import LENGTH, write_small_clip, write_small_t5
from test_shard_damage import DAMAGES, in_time
from test_shards import contents

import data.embedding_file
from core.npz import write_npz
from core.reading import sha256_of
from data.cache import Cache
from data.embedding_file import CaptionEmbeddings
from data.encode import Workers
from data.images import UnreadableImageError
from data.manifest import Manifest
from data.shards import MappedShards
from data.sources import Example
from data.text_encoders import CLIPText, EncodedText, T5Text, TextEncoder
from data.verify import files_of, verify

CPU = torch.device("cpu")
TEXTS = [f"shard-{shard:06d}-text.npz" for shard in range(4)]


class Worded(PatternSource):
    """The pattern source with one to three captions of an image, of different lengths."""

    fingerprint = "worded"

    def __getitem__(self, index: int) -> Example:
        several = f"digit {'a' * (index % 7)}", "a drawing of the number seven", "three" * 9
        return super().__getitem__(index)._replace(captions=several[: 1 + index % 3])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> CLIPText:
    return CLIPText(str(write_small_clip(tmp_path_factory.mktemp("clip") / "clip")))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> T5Text:
    return T5Text(str(write_small_t5(tmp_path_factory.mktemp("t5") / "t5")), length=10)


def encode(folder: Path, text: TextEncoder, source: Any = None, **changes: Any) -> Any:
    return encode_pattern(folder, source or Worded(), text=text, embed_on=CPU, **changes)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, clip: CLIPText) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    encode(folder, clip)
    return folder


def visits(shards: MappedShards) -> tuple[np.ndarray, np.ndarray]:
    """Return every row and number of a caption within it, in a mixed order."""
    counts = shards.num_captions(np.arange(len(shards)))
    pairs = np.array([(row, number) for row, count in enumerate(counts) for number in range(count)])
    mixed = np.random.default_rng(0).permutation(pairs)
    return mixed[:, 0].copy(), mixed[:, 1].copy()


def everything(folder: Path | str, cache: Cache | None = None) -> list[Any]:
    shards = MappedShards(folder, cache=cache)
    found = shards.embeddings_of(*visits(shards))
    read = [array.tobytes() for array in (*found, *shards.tokens_of_captions(*visits(shards)))]
    shards.close()
    return read


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_embeddings_are_the_encoders_and_ids_and_masks_those_of_each_row(
    tmp_path: Path, request: Any, kind: str
) -> None:
    encoder: TextEncoder = request.getfixturevalue(kind)
    encode(tmp_path, encoder)
    shards = MappedShards(tmp_path)
    rows, chosen = visits(shards)
    assert len(rows) == shards.manifest.captions.count == 99  # type: ignore
    tokens, found = shards.tokens_of_captions(rows, chosen), shards.embeddings_of(rows, chosen)
    for number, (row, which) in enumerate(zip(rows.tolist(), chosen.tolist(), strict=True)):
        ids, mask, _ = encoder.tokenize([shards.captions_of(row)[which]])
        expected = encoder.encode(torch.from_numpy(ids), torch.from_numpy(mask))
        np.testing.assert_array_equal(tokens.ids[number], ids[0])
        np.testing.assert_array_equal(tokens.mask[number], mask[0])
        np.testing.assert_array_equal(found.mask[number], mask[0])
        np.testing.assert_allclose(found.tokens[number], expected.tokens[0].numpy(), atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(found.pooled[number], expected.pooled[0].numpy(), atol=2e-3, rtol=1e-3)
    assert (found.tokens.dtype, found.pooled.dtype, tokens.ids.dtype) == (np.float16, np.float16, np.int32)
    spec = shards.use_embeddings()
    assert spec == encoder.spec()
    given = CaptionEmbeddings.empty(len(rows), spec)
    assert shards.embeddings_of(rows, chosen, given) is given
    assert all(np.array_equal(one, two) for one, two in zip(given, found, strict=True))
    assert verify(tmp_path, silent_progress)[1] == []
    assert set(TEXTS) <= set(files_of(tmp_path, shards.manifest))


def test_a_folder_without_them_is_as_before_and_says_what_to_do(tmp_path: Path, sound: Path, clip: CLIPText) -> None:
    encode_pattern(tmp_path, Worded(), text=clip)
    plain, stored = contents(tmp_path), contents(sound)
    assert plain.keys() == stored.keys() - set(TEXTS)
    same = [name for name in plain if plain[name] == stored[name]]
    assert {*same} == {name for name in plain if not name.endswith(".json")} | {"classes.json"}  # records apart
    assert b"embeddings" not in b"".join(content for name, content in plain.items() if name.endswith(".json"))
    with pytest.raises(ValueError, match=r"no embeddings of captions; encode with text_embeddings=true into another"):
        MappedShards(tmp_path).use_embeddings()
    with pytest.raises(ValueError, match=r"text_embeddings is false and not true; encode into another data.shards"):
        encode(tmp_path, clip)
    with pytest.raises(ValueError, match=r"text_embeddings is true and not false; encode into another data.shards"):
        encode_pattern(sound, Worded(), text=clip)


def test_bytes_depend_neither_on_processes_nor_on_the_batch_size_nor_on_stops(
    tmp_path: Path, sound: Path, clip: CLIPText
) -> None:
    for rank in (1, 2, 0):
        encode(tmp_path / "many", clip, workers=Workers(rank, 3), batch_size=5)
    assert contents(tmp_path / "many") == contents(sound)
    stopped = Path(shutil.copytree(sound, tmp_path / "stopped"))
    for name in ("manifest.json", TEXTS[1], "shard-000002.json"):
        (stopped / name).unlink()
    (stopped / f".{TEXTS[1]}.99.tmp").write_bytes(b"half")  # of a killed process
    (stopped / "shard-000009-text.npz").write_bytes(b"of an earlier plan")
    encode(stopped, clip)
    assert contents(stopped) == contents(sound)
    assert not (stopped / f".{TEXTS[1]}.99.tmp").exists()


class _Counted:
    """An encoder that counts the captions that it embeds."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder, self.num_embedded = encoder, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, ids: torch.Tensor, mask: torch.Tensor) -> EncodedText:
        self.num_embedded += len(ids)
        return self._encoder.encode(ids, mask)


def test_what_is_stored_is_not_embedded_again(tmp_path: Path, sound: Path, clip: CLIPText) -> None:
    folder, counted = Path(shutil.copytree(sound, tmp_path / "shards")), _Counted(clip)
    images = (folder / "shard-000001.tar").stat().st_mtime_ns
    (folder / TEXTS[1]).write_bytes(b"damaged")
    encode(folder, counted)  # type: ignore
    in_shard = sum(len(MappedShards(folder).captions_of(row)) for row in range(16, 32))
    assert counted.num_embedded == in_shard + 1  # and the empty caption
    assert (folder / "shard-000001.tar").stat().st_mtime_ns == images
    assert contents(folder) == contents(sound)


def test_a_shard_is_embedded_in_pieces(
    tmp_path: Path, sound: Path, clip: CLIPText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.embedding_file, "_TOGETHER", 5)  # of 2 to 33 captions in a shard
    encode(tmp_path, clip)
    one, two = MappedShards(tmp_path), MappedShards(sound)
    for pieces, whole in zip(one.embeddings_of(*visits(one)), two.embeddings_of(*visits(two)), strict=True):
        np.testing.assert_allclose(pieces, whole, atol=2e-3, rtol=1e-3)


class _WithoutLast(Worded):
    """The worded source without the images of the last shard."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __getitem__(self, index: int) -> Example:
        if f"pattern-{index}" in self._names:
            raise UnreadableImageError("is garbage", f"pattern-{index}")
        return super().__getitem__(index)


def test_a_shard_may_have_no_captions(tmp_path: Path, sound: Path, clip: CLIPText) -> None:
    names = MappedShards(sound).source_ids[48:].tolist()
    encode(tmp_path, clip, _WithoutLast(names), max_skipped_fraction=0.1)
    one, two = MappedShards(tmp_path), MappedShards(sound)
    assert one.counts == [16, 16, 16, 0]
    for found, expected in zip(one.embeddings_of(*visits(one)), two.embeddings_of(*visits(one)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert verify(tmp_path, silent_progress)[1] == []


def test_a_process_that_embeds_nothing_reads_no_weights_and_others_read_them_first(tmp_path: Path) -> None:
    encoder = CLIPText(str(write_small_clip(tmp_path / "clip")))
    (tmp_path / "clip/model.safetensors").write_bytes(b"damaged")
    encode_pattern(tmp_path / "shards", Worded(), text=encoder, workers=Workers(1, 2))
    for rank, embed_on in ((0, None), (1, CPU)):
        with pytest.raises(ValueError, match=r"model.safetensors does not hold a readable CLIP"):
            encode_pattern(tmp_path / f"{rank}", Worded(), text=encoder, workers=Workers(rank, 2), embed_on=embed_on)
        assert not list((tmp_path / f"{rank}").glob("shard-*"))


class _Large(_Counted):
    """An encoder whose pooled vector of one caption does not fit float16."""

    def encode(self, ids: torch.Tensor, mask: torch.Tensor) -> EncodedText:
        found = self._encoder.encode(ids, mask)
        return found._replace(pooled=torch.where(mask.all(dim=1, keepdim=True), 7e4, found.pooled))


def test_values_that_float16_cannot_hold_are_refused_by_the_name_of_their_image(tmp_path: Path, clip: CLIPText) -> None:
    with pytest.raises(
        ValueError, match=r"clip_text gives values of the caption 'threethree.*' of pattern-\d+ that float16 cannot hol"
    ):
        encode(tmp_path, _Large(clip))  # type: ignore
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_mended(sound: Path, tmp_path: Path, clip: CLIPText, damage: str) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    DAMAGES[damage](folder / TEXTS[2])
    read = in_time(lambda: everything(folder))
    assert isinstance(read, ValueError)
    assert TEXTS[2] in str(read)
    assert len(MappedShards(folder)) == 50  # training without text does not open it
    assert [found.file for found in in_time(lambda: verify(folder, silent_progress))[1]] == [TEXTS[2]]
    again = in_time(lambda: encode(folder, clip))
    if isinstance(again, ValueError):
        assert f"{TEXTS[2]} is a folder" in str(again)
        (folder / TEXTS[2]).rmdir()
        encode(folder, clip)
    assert contents(folder) == contents(sound)
    assert everything(folder) == everything(sound)


Arrays = dict[str, np.ndarray]


def rewritten(folder: Path, name: str, change: Callable[[Arrays], object]) -> None:
    """Change the arrays of a file, and put its hash and size into the manifest."""
    with np.load(folder / name) as content:
        arrays = {array: content[array].copy() for array in content.files}
    change(arrays)
    write_npz(folder / name, arrays)
    manifest = Manifest.load(folder)
    size = {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
    files = [replace(file, **size) if file.name == name else file for file in manifest.embeddings]
    with_files(manifest, files).save(folder)


def with_files(manifest: Manifest, files: Any) -> Manifest:
    captions = manifest.captions
    assert captions is not None
    assert captions.tokens is not None
    return replace(manifest, captions=replace(captions, tokens=replace(captions.tokens, embeddings=files)))


CHANGES: dict[str, Callable[[Arrays], object]] = {
    "tokens of another length": lambda arrays: arrays.update(tokens=arrays["tokens"][:, 1:].repeat(2, axis=1)),
    "tokens of another type": lambda arrays: arrays.update(tokens=arrays["tokens"].astype("<f4")),
    "vectors too many": lambda arrays: arrays.update(pooled=arrays["pooled"].repeat(2, axis=0)),
    "vectors of another type": lambda arrays: arrays.update(pooled=arrays["pooled"].view("<i2")),
    "no vectors": lambda arrays: arrays.update(other=arrays.pop("pooled"), tokens=arrays["tokens"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_manifest_vouches_for_is_still_checked(sound: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    rewritten(folder, TEXTS[1], CHANGES[change])
    with pytest.raises(ValueError, match=rf"{TEXTS[1]} is damaged: .*; run the same `ditscale encode` again"):
        everything(folder)
    assert TEXTS[1] in {found.file for found in verify(folder, silent_progress)[1]}


def test_values_that_are_not_finite_are_found_by_verify(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    rewritten(folder, TEXTS[1], lambda arrays: arrays["tokens"].__setitem__((3, 2, 1), np.inf))
    assert [TEXTS[1], "has 1 values that are not finite"] in [
        list(found) for found in verify(folder, silent_progress)[1]
    ]


def test_a_record_of_other_embeddings_is_found_and_made_again(sound: Path, tmp_path: Path, clip: CLIPText) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    path = folder / "shard-000001.json"
    content = json.loads(path.read_text())
    content.pop("record_sha256")
    for change, sentence in (
        ({"sha256": "0" * 64}, "records other embeddings of captions than manifest.json"),
        ({"name": "../x.npz"}, r"is damaged: it records \d+ embeddings in '../x.npz', not"),
        ({"count": 1}, r"is damaged: it records 1 embeddings in"),
        ({"url": "x"}, "is damaged"),
    ):
        path.write_text(json.dumps({**content, "embeddings": {**content["embeddings"], **change}}))
        (found,) = verify(folder, silent_progress)[1]
        assert found.file == path.name
        assert re.search(sentence, found.reason), found.reason
    encode(folder, clip)
    assert contents(folder) == contents(sound)


MANIFESTS: dict[str, Callable[[list[Any]], object]] = {
    "a file too few": lambda files: files.pop(),
    "none": lambda files: files.clear(),
    "a file elsewhere": lambda files: files[1].update(name="../shard-000001-text.npz"),
    "the file of another shard": lambda files: files[1].update(name=files[0]["name"]),
    "another number of captions": lambda files: files[1].update(count=files[1]["count"] + 1),
    "more captions than bytes": lambda files: files[1].update(bytes=1000),
    "a hash that is a path": lambda files: files[1].update(sha256="../x"),
    "a foreign field": lambda files: files[1].update(url="http://x"),
}


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_manifest_of_another_form_is_refused(sound: Path, tmp_path: Path, change: str) -> None:
    content = json.loads((sound / "manifest.json").read_text())
    del content["record_sha256"]
    MANIFESTS[change](content["captions"]["tokens"]["embeddings"])
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest.json is damaged: .*; delete it and run"):
        Manifest.load(tmp_path)


def test_numbers_of_captions_that_other_files_contradict_are_refused(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    manifest = Manifest.load(folder)
    first, second, *others = manifest.embeddings
    swapped = [replace(first, count=first.count - 1), replace(second, count=second.count + 1), *others]
    bytes_ = [replace(file, bytes=file.bytes + 2**10) for file in swapped]
    with_files(manifest, bytes_).save(folder)
    with pytest.raises(ValueError, match=r"manifest.json is damaged: it says embeddings of other numbers of captions"):
        MappedShards(folder).use_embeddings()
    assert "manifest.json" in {found.file for found in verify(folder, silent_progress)[1]}


def test_a_file_that_is_cut_while_it_is_read_ends_in_a_sentence(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    shards, row = MappedShards(folder), np.array([20])
    shards.embeddings_of(row, np.array([0]))
    with (folder / TEXTS[1]).open("r+b") as file:
        file.truncate(300)
    with pytest.raises(ValueError, match=rf"{TEXTS[1]} was cut while this job ran; run the same"):
        shards.embeddings_of(row, np.array([0]))


def test_a_caption_that_a_row_does_not_have_is_the_programs_fault(sound: Path) -> None:
    shards, last = MappedShards(sound), np.array([49])
    count = shards.num_captions(last)
    for wrong in (count, np.array([-1])):
        with pytest.raises(AssertionError):
            shards.tokens_of_captions(last, wrong)
        with pytest.raises(AssertionError):
            shards.embeddings_of(last, wrong)


def test_behind_a_url_they_come_and_go_with_their_shards(sound: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(sound)
    sizes = [shard.bytes + file.bytes for shard, file in zip(manifest.shards, manifest.embeddings, strict=True)]
    captions = manifest.captions
    assert captions is not None
    room = captions.bytes + sum(sorted(sizes)[-2:])
    with FaultyServer(sound).running() as server:
        cache = Cache(tmp_path / "cache", room, patience_sec=5)
        shards = MappedShards(server.url, True, cache)
        shards.use_embeddings()
        shards.require_room(2, can_be_fewer=True)
        with pytest.raises(
            ValueError, match=r"data.order needs at a time have \d+ bytes beside \d+ of captions; raise"
        ):
            shards.require_room(3, can_be_fewer=True)
        local = MappedShards(sound)
        for window in ([0, 1], [1, 2], [2, 3], [3, 0]):
            shards.expect(window)
            rows = np.arange(16 * window[0], min(16 * window[0] + 16, 50))
            chosen = np.zeros_like(rows)
            moments = [each.gather(rows, np.zeros(len(rows), bool)) for each in (shards, local)]
            np.testing.assert_array_equal(*moments)
            for one, other in zip(*(each.embeddings_of(rows, chosen) for each in (shards, local)), strict=True):
                np.testing.assert_array_equal(one, other)
        assert server.gets[TEXTS[3]] == 1
        shards.close()
        plain = MappedShards(server.url, True, Cache(tmp_path / "plain", sum(shard.bytes for shard in manifest.shards)))
        plain.require_room(4, can_be_fewer=True)
        plain.gather(np.arange(50), np.zeros(50, bool))
        plain.close()
        assert server.gets[TEXTS[3]] == 1  # a run without text does not fetch them
        assert everything(server.url, Cache(tmp_path / "large", 10**9)) == everything(sound)


def test_the_command_stores_them_and_repairs_them_without_being_told_how(in_process: InProcess) -> None:
    write_small_clip(Path("clip"))
    words = ["data=digits", "data/captions=digits", "data.shards=shards", "text_embeddings=true"]
    assert "text_embeddings is true, but there is no text encoder; choose" in in_process("encode", *words, expect=2)
    words += ["data/text_encoder=clip", "text_encoder.folder=clip", "captions.templates=['digit {name}']"]
    shown = in_process("encode", *words)
    assert f"tokens of clip_text, with embeddings of {1797 * 2 * (LENGTH * 16 + 16) / 2**20:.1f} MiB" in shown
    before = contents(Path("shards"))
    Path("shards", TEXTS[0]).write_bytes(b"")
    assert f"{TEXTS[0]} has 0 bytes" in in_process("verify", "data.shards=shards", expect=2)
    assert "match the manifest" in in_process("verify", "data.shards=shards", "repair=true")
    assert contents(Path("shards")) == before
