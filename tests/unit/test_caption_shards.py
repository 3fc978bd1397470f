"""Shards store captions: every row's can be read, damage is named and mended, and shards without any are as before."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import InProcess, PatternSource, encode_pattern, silent_progress
from faulty_server import FaultyServer
from test_hostile_arrays import npy, npy_of_shape, npz_of
from test_shard_damage import DAMAGES, in_time
from test_shards import contents

from core.npz import write_npz
from core.reading import sha256_of
from data.cache import Cache
from data.caption_file import captions_to_store
from data.captions import Captioned, Templates
from data.encode import Workers
from data.images import UnreadableImageError
from data.manifest import Manifest
from data.shards import MappedShards
from data.sources import MAX_CAPTION, Example, Prepared
from data.verify import files_of, verify


class Described(PatternSource):
    """The pattern source with one to three captions of an image, and one image that cannot be read."""

    def __init__(self, without: int | None = None) -> None:
        super().__init__()
        self.fingerprint, self._without = f"described {without}", without

    def __getitem__(self, index: int) -> Example:
        if index == 7:
            raise UnreadableImageError("is garbage", "pattern-7")
        example = super().__getitem__(index)
        return example if index == self._without else example._replace(captions=captions_of(index))


def captions_of(index: int) -> tuple[str, ...]:
    several = f"a ramp that begins at {3 * index}", f"наклон № {index}", "\U0001f4c8"
    return several[: 1 + index % 3]


def encode(folder: Path, source: Any = None, **changes: Any) -> Any:
    return encode_pattern(folder, source or Described(), **{"max_skipped_fraction": 0.1, **changes})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    encode(folder)
    return folder


def everything(folder: Path) -> list[Any]:
    shards = MappedShards(folder)
    return [[shards.captions_of(row) for row in range(len(shards))], shards.source_ids.tolist(), shards.manifest.hash]


def test_each_row_has_the_captions_of_its_image(sound: Path) -> None:
    shards = MappedShards(sound)
    names = shards.source_ids.tolist()
    expected = [list(captions_of(int(name.removeprefix("pattern-")))) for name in names]
    rows = [48, *range(49)]  # in any order
    assert [shards.captions_of(row) for row in rows] == [expected[row] for row in rows]
    with ThreadPoolExecutor(4) as threads:  # from several threads
        assert list(threads.map(shards.captions_of, range(49))) == expected
    spec = shards.manifest.captions
    assert spec is not None
    assert spec.count == sum(map(len, expected))
    assert (spec.bytes, spec.sha256) == ((sound / "captions.npz").stat().st_size, sha256_of(sound / "captions.npz"))
    with np.load(sound / "captions.npz", allow_pickle=False) as arrays:  # any program can read it
        assert bytes(arrays["text"]).decode() == "".join(caption for row in expected for caption in row)
        assert (arrays["first"].dtype, arrays["end"].dtype, arrays["text"].dtype) == (np.int64, np.int64, np.uint8)


def test_shards_of_images_without_captions_are_as_before_and_say_so(tmp_path: Path, sound: Path) -> None:
    encode_pattern(tmp_path)
    assert not (tmp_path / "captions.npz").exists()
    assert "captions" not in (tmp_path / "manifest.json").read_text() + (tmp_path / "shard-000001.json").read_text()
    with pytest.raises(
        ValueError, match=r"The shards in .* have no captions; encode images with captions into another"
    ):
        MappedShards(tmp_path).captions_of(0)
    tars = {path.name: path.read_bytes() for path in sound.glob("shard-*.tar")}
    plain = tmp_path / "plain"  # the same images without their captions
    encode_pattern(plain, _Unreadable(), max_skipped_fraction=0.1)
    assert tars == {path.name: path.read_bytes() for path in plain.glob("shard-*.tar")}


class _Unreadable(Described):
    def __getitem__(self, index: int) -> Example:
        return super().__getitem__(index)._replace(captions=())


def test_an_image_without_a_caption_beside_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pattern-\d+ has a caption, but pattern-3 has none; give captions to all"):
        encode(tmp_path / "one", Described(without=3))
    with pytest.raises(ValueError, match=r"pattern-\d+ has a caption, but pattern-3 has none; give captions to all"):
        encode(tmp_path / "two", Described(without=3), samples_per_shard=1)  # alone in its shard


def test_captions_too_large_for_the_record_of_a_shard_are_refused(tmp_path: Path) -> None:
    example = Prepared("a", np.zeros(1), 0, ("x" * MAX_CAPTION,))
    assert captions_to_store(tmp_path / "shard-000000.tar", [example] * 1024, None) == [["x" * MAX_CAPTION]] * 1024
    with pytest.raises(
        ValueError, match=r"000000.tar have 16793600 characters, .* 16777216; set a smaller data.samples"
    ):
        captions_to_store(tmp_path / "shard-000000.tar", [example] * 1025, None)


def test_parallel_repeated_and_stopped_encodings_give_the_same_bytes(tmp_path: Path, sound: Path) -> None:
    for rank in (1, 2, 0):
        encode(tmp_path / "many", workers=Workers(rank, 3))
    assert contents(tmp_path / "many") == contents(sound)
    shutil.copytree(sound, tmp_path / "stopped")
    for name in ("manifest.json", "captions.npz", "shard-000002.json"):
        (tmp_path / "stopped" / name).unlink()
    (tmp_path / "stopped/.captions.npz.99.tmp").write_bytes(b"half")  # of a killed process
    encode(tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(sound)
    assert not (tmp_path / "stopped/.captions.npz.99.tmp").exists()


def test_other_captions_of_the_same_images_are_another_data_set(tmp_path: Path) -> None:
    one, two = (Captioned(PatternSource(), Templates([template])) for template in ("a {name}", "the {name}"))
    first = encode(tmp_path / "one", one)
    with pytest.raises(ValueError, match=r"already holds other shards: .* or captions do; encode into another"):
        encode(tmp_path / "one", two)
    assert encode(tmp_path / "two", two).hash != first.hash
    assert MappedShards(tmp_path / "two").captions_of(0)[0].startswith("the class ")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_captions_is_named_and_mended(sound: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    DAMAGES[damage](folder / "captions.npz")
    read = in_time(lambda: everything(folder))
    assert isinstance(read, ValueError)
    assert "captions.npz" in str(read)
    assert len(MappedShards(folder)) == 49  # training without text does not open it
    assert {found.file for found in in_time(lambda: verify(folder, silent_progress))[1]} == {"captions.npz"}
    again = in_time(lambda: encode(folder))
    if isinstance(again, ValueError):
        assert "captions.npz is a folder" in str(again)
        (folder / "captions.npz").rmdir()
        encode(folder)
    assert contents(folder) == contents(sound)
    assert everything(folder) == everything(sound)


def test_a_file_of_captions_that_is_missing_is_named(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    (folder / "captions.npz").unlink()
    with pytest.raises(ValueError, match=r"captions.npz is missing, but the manifest lists it; run the same"):
        MappedShards(folder).captions_of(0)
    (damage,) = verify(folder, silent_progress)[1]
    assert (damage.file, damage.reason) == ("captions.npz", "is missing")
    assert "captions.npz" in files_of(folder, Manifest.load(folder))


Arrays = dict[str, np.ndarray]


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, Arrays], object]:
    return lambda path, arrays: write_npz(path, {**arrays, name: change(arrays[name])})


def at(number: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.concatenate([array[:number], [value], array[number + 1 :]]).astype(array.dtype)


FILES: dict[str, Callable[[Path, Arrays], object]] = {
    "a first row too few": changed("first", lambda first: first[:-1]),
    "first rows in two columns": changed("first", lambda first: np.stack([first, first])),
    "first rows that are floats": changed("first", lambda first: first.astype(np.float64)),
    "first rows below zero": changed("first", at(0, -1)),
    "a first row that is not the first": changed("first", at(0, 1)),
    "a row without captions": changed("first", lambda first: at(8, int(first[7]))(first)),
    "first rows past the end": changed("first", at(48, 10**6)),
    "an end too many": changed("end", lambda end: np.append(end, end[-1])),
    "ends that fall": changed("end", lambda end: end[::-1].copy()),
    "an end past the text": changed("end", lambda end: at(len(end) - 1, 2**62)(end)),
    "ends that wrap around": changed("end", lambda end: at(3, -(2**63))(at(2, 2**63 - 1)(end))),
    "an end before the text's": changed("end", lambda end: end - 1),
    "a caption that is too long": lambda path, arrays: write_npz(
        path, {**arrays, "end": arrays["end"] + 2**20, "text": np.pad(arrays["text"], (2**20, 0), constant_values=97)}
    ),
    "text that is not bytes": changed("text", lambda text: text.astype(np.int8)),
    "text that is not UTF-8": changed("text", lambda text: np.full_like(text, 0xFF)),
    "a huge shape": lambda path, arrays: npz_of(path, [("first.npy", npy_of_shape("(1000000000000,)"))]),
    "no text": lambda path, arrays: write_npz(path, {"first": arrays["first"], "end": arrays["end"]}),
    "another order": lambda path, arrays: write_npz(path, dict(reversed(arrays.items()))),
    "compressed": lambda path, arrays: npz_of(path, [(f"{k}.npy", npy(v)) for k, v in arrays.items()], 8),
    "no zip file": lambda path, arrays: path.write_bytes(b"x" * 4096),
}


@pytest.mark.parametrize("make", FILES)
def test_captions_that_the_manifest_vouches_for_are_still_checked(sound: Path, tmp_path: Path, make: str) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    path = folder / "captions.npz"
    with np.load(path) as arrays:
        FILES[make](path, {name: arrays[name].copy() for name in arrays.files})
    spec = Manifest.load(folder).captions
    assert spec is not None
    stated = replace(spec, sha256=sha256_of(path), bytes=path.stat().st_size)
    replace(Manifest.load(folder), captions=stated).save(folder)
    with pytest.raises(ValueError, match=r"captions\.npz is damaged: .*; run the same `ditscale encode` again"):
        everything(folder)
    assert {found.file for found in verify(folder, silent_progress)[1]} >= {"captions.npz"}
    encode(folder)
    assert contents(folder) == contents(sound)


def test_a_sidecar_with_other_captions_is_named_and_one_without_a_hash_is_made_again(
    sound: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    path = folder / "shard-000001.json"
    content = json.loads(path.read_text())
    content.pop("record_sha256")
    content["captions"][0] = ["another"]
    path.write_text(json.dumps(content))
    assert verify(folder, silent_progress)[1] == [("shard-000001.json", "has other captions than captions.npz")]
    encode(folder)
    assert contents(folder) == contents(sound)
    for wrong in ([["a"]], [[]] * 16, [[""]] * 16, [["x" * (2**14 + 1)]] * 16, [[3]] * 16, "a"):
        path.write_text(json.dumps({**content, "captions": wrong}))
        (damage,) = verify(folder, silent_progress)[1]
        assert damage.file == "shard-000001.json"


def test_captions_behind_a_url_are_fetched_once_through_the_cache(sound: Path, tmp_path: Path) -> None:
    with FaultyServer(sound).running() as server:
        for _ in range(2):
            shards = MappedShards(server.url, True, Cache(tmp_path / "cache", 10**9))
            assert [shards.captions_of(row) for row in range(49)] == everything(sound)[0]
            shards.close()
        assert server.gets["captions.npz"] == 1
        small = MappedShards(server.url, True, Cache(tmp_path / "small", 1000))
        with pytest.raises(ValueError, match=r"data.cache_bytes is 1000, but the captions of http.* have \d+ bytes"):
            small.captions_of(0)
        small.close()


def test_a_file_that_is_cut_while_it_is_read_ends_in_a_sentence(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    shards = MappedShards(folder)
    assert shards.captions_of(0)
    with (folder / "captions.npz").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"captions.npz was cut while this job ran; run the same"):
        shards.captions_of(48)


def test_the_command_stores_captions_and_repairs_them_without_being_told_how(in_process: InProcess) -> None:
    in_process("encode", "data=digits", "data/captions=digits", "data.shards=shards")
    shards, before = MappedShards("shards"), contents(Path("shards"))
    label = int(shards.labels[5])
    assert shards.captions_of(5)[1] == f"digit {label}"
    Path("shards/captions.npz").write_bytes(b"")
    assert "captions.npz has 0 bytes" in in_process("verify", "data.shards=shards", expect=2)
    assert "match the manifest" in in_process("verify", "data.shards=shards", "repair=true")
    assert contents(Path("shards")) == before
