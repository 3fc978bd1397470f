"""A damaged file of a folder of shards is named or made again, without hangs or different results."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import InProcess, PatternSource, encode_pattern, silent_progress
from test_shards import contents

from core.npz import write_npz
from core.reading import sha256_of
from core.records import SEAL
from data.images import UnreadableImageError
from data.manifest import Manifest
from data.shards import MappedShards
from data.sidecars import read_sidecar
from data.sources import Example
from data.verify import verify
from model.autoencoder import IdentityAutoencoder

FILES = [
    "manifest.json",
    "index.npz",
    "labels.npz",
    "shard-000001.tar",
    "shard-000001.json",
    "skipped.jsonl",
    "classes.json",
    ".encode-0.lock",
]
FOR_TRAINING = {"manifest.json", "index.npz", "labels.npz", "shard-000001.tar"}


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes() or b" ")  # a lock is empty
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def made(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def instead(path: Path) -> None:
        path.unlink()
        make(path)

    return instead


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit in the middle": lambda path: flip(path, 0.5),
    "bit near the end": lambda path: flip(path, 0.97),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "junk": lambda path: path.write_bytes(b"\xff\x00junk"),
    "null": lambda path: path.write_bytes(b"null"),
    "brackets": lambda path: path.write_bytes(b"[" * 10**6),
    "folder": made(lambda path: path.mkdir()),
    "pipe": made(os.mkfifo),
    "link to a device": made(lambda path: path.symlink_to("/dev/zero")),
    "link to itself": made(lambda path: path.symlink_to(path.name)),
    "link out": made(lambda path: path.symlink_to("/etc/passwd")),
}


class Faulty(PatternSource):
    """The pattern source with one unreadable image."""

    def __getitem__(self, index: int) -> Example:
        if index == 7:
            raise UnreadableImageError("is garbage", "pattern-7")
        return super().__getitem__(index)


def encode(folder: Path) -> Any:
    return encode_pattern(folder, Faulty(), max_skipped_fraction=0.1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    encode(folder)
    return folder


def in_time(action: Callable[[], Any]) -> Any:
    """Return what ``action`` returns, or its ValueError; any other exception, and a hang, fail the test."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(action())
        except BaseException as error:
            found.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(30)
    assert found, "it hangs"
    if isinstance(found[0], BaseException) and not isinstance(found[0], ValueError):
        raise found[0]
    return found[0]


def everything(folder: Path) -> list[Any]:
    """Return everything that training can read."""
    shards = MappedShards(folder)
    rows = np.arange(len(shards))
    values = [shards.gather(rows, np.full(len(rows), flip)).tobytes() for flip in (False, True)]
    return [*values, shards.labels.tolist(), shards.source_ids.tolist(), shards.manifest.hash]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_or_mended_and_changes_no_result(sound: Path, folder: Path, name: str, damage: str) -> None:
    DAMAGES[damage](folder / name)
    read = in_time(lambda: everything(folder))
    if name in FOR_TRAINING:
        assert name in str(read), read
        assert isinstance(read, ValueError)
    else:
        assert read == everything(sound)

    verified = in_time(lambda: verify(folder, silent_progress))
    if isinstance(verified, ValueError):
        assert name == "manifest.json"
        assert name in str(verified)
    else:
        named = {found.file for found in verified[1]}
        assert named == (set() if name == ".encode-0.lock" else {name}), verified[1]

    again = in_time(lambda: encode(folder))
    if isinstance(again, ValueError):
        assert name in str(again)
        assert "remove it" in str(again) or "delete it" in str(again) or "put the file itself" in str(again)
        if (folder / name).is_dir():
            (folder / name).rmdir()
        else:
            (folder / name).unlink()
        encode(folder)
    assert contents(folder) == contents(sound)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("manifest.json", "pipe"), ("labels.npz", "folder"), ("shard-000001.tar", "link to a device")],
)
def test_the_jobs_name_what_is_no_file_in_one_sentence(
    digits: Path, in_process: InProcess, name: str, damage: str
) -> None:
    shutil.copytree(digits, "shards")
    DAMAGES[damage](Path("shards", name))
    shown = in_process("train", "experiment=demo", "data.shards=shards", "total_steps=1", expect=2)
    assert f"shards/{name}" in shown
    shown += in_process("verify", "data.shards=shards", expect=2)
    assert shown.count("error: ") == 2
    assert "Traceback" not in shown
    again = in_process("encode", "data=digits", "data.shards=shards", expect=0 if name == "shard-000001.tar" else 2)
    assert {"pipe": "delete it", "folder": "remove it", "link to a device": "8 shards"}[damage] in again
    assert "Traceback" not in again


def altered(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record and drop its hash, which makes it one of an earlier version."""
    content = json.loads(path.read_text())
    del content[SEAL]
    change(content)
    path.write_text(json.dumps(content))


SIDECAR_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another label": lambda record: record["labels"].__setitem__(3, (record["labels"][3] + 1) % 5),
    "another layout": lambda record: record.update(layout=[record["layout"][0] + 2, record["layout"][1]]),
    "labels too short": lambda record: record["labels"].pop(),
    "names too short": lambda record: record["source_ids"].pop(),
    "no layout": lambda record: record.pop("layout"),
    "a layout of one number": lambda record: record.update(layout=[1664]),
    "a count in quotes": lambda record: record["entry"].update(count="16"),
    "a huge label": lambda record: record["labels"].__setitem__(0, 10**30),
    "a null label": lambda record: record["labels"].__setitem__(0, None),
    "other bytes": lambda record: record["entry"].update(bytes=record["entry"]["bytes"] + 512),
    "a name elsewhere": lambda record: record["entry"].update(name="../../../../etc/passwd"),
    "other sums": lambda record: record["sums"].update(mean=[record["sums"]["mean"][0] + 100]),
    "sums too short": lambda record: record["sums"].update(mean=[]),
    "sums that are infinite": lambda record: record["sums"].update(square=[float("inf")]),
    "a foreign field": lambda record: record.update(note="x"),
    "null entry": lambda record: record.update(entry=None),
    "a skipped image of numbers": lambda record: record.update(skipped=[{"source_id": 3, "reason": "x"}]),
}


@pytest.mark.parametrize("change", SIDECAR_CHANGES)
def test_a_sidecar_without_a_hash_is_believed_no_more_than_its_shard_says(
    sound: Path, folder: Path, change: str
) -> None:
    """Use sidecars of an earlier version, which the issue says were believed although damaged."""
    altered(folder / "shard-000001.json", SIDECAR_CHANGES[change])
    assert [damage.file for damage in verify(folder, silent_progress)[1]] == ["shard-000001.json"]
    encode(folder)
    assert contents(folder) == contents(sound)


def test_sound_sidecars_without_a_hash_are_kept(sound: Path, folder: Path) -> None:
    for path in folder.glob("*.json"):
        if path.name != "classes.json":
            altered(path, lambda record: None)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert verify(folder, silent_progress)[1] == []
    assert Manifest.load(folder).hash == encode(folder).hash == Manifest.load(sound).hash
    assert {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == times
    assert everything(folder) == everything(sound)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda label, layout: label.__setitem__(20, (label[20] + 1) % 5),
            "has other labels than shard-000001.tar",
        ),
        (
            lambda label, layout: layout.__setitem__((1, 0), 1666),
            "offset=1666, stride=2560) for shard-000001.tar",
        ),
    ],
)
def test_an_index_made_of_a_damaged_sidecar_is_blamed_and_mended_and_no_sound_tar(
    sound: Path, folder: Path, change: Callable[..., object], words: str
) -> None:
    """Use a folder of an earlier version, whose manifest and index agree with each other but not with a shard."""
    with np.load(folder / "index.npz") as index:
        arrays = {name: index[name].copy() for name in index.files}
    change(arrays["label"], arrays["layout"])
    write_npz(folder / "index.npz", arrays)
    replace(Manifest.load(folder), index_sha256=sha256_of(folder / "index.npz"), labels_sha256=None).save(folder)
    (damage,) = verify(folder, silent_progress)[1]
    assert damage.file == "index.npz"
    assert words in damage.reason
    if arrays["layout"][1, 0] == 1666:
        with pytest.raises(ValueError, match=r"shard-000001.tar is not the shard that the index describes"):
            everything(folder)
    encode(folder)
    assert contents(folder) == contents(sound)


@pytest.mark.parametrize("name", ["manifest.json", "shard-000001.json"])
def test_every_flipped_bit_of_a_record_is_found(sound: Path, folder: Path, name: str) -> None:
    """Flip bits in the name of its hash too: a new record must not pass for one of an earlier version."""
    whole = (folder / name).read_bytes()
    spec = Manifest.load(sound).spec

    def read(place: Path) -> Any:
        return Manifest.load(place) if name == "manifest.json" else read_sidecar(place, "shard-000001.tar", spec)

    expected = read(sound)
    for place in range(0, 8 * len(whole), 11):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(damaged)
        try:
            found = read(folder)
        except ValueError as error:
            found = str(error)
        assert found == expected or name in found  # a blank may have become another blank


def test_a_repair_mends_a_sidecar_and_what_people_read(in_process: InProcess) -> None:
    encode_digits = ["data=digits", "data.shards=digits"]
    in_process("encode", *encode_digits)
    before = contents(Path("digits"))
    flip(Path("digits/shard-000003.json"), 0.5)
    Path("digits/classes.json").write_text("{}")
    shown = in_process("verify", *encode_digits, expect=2)
    assert "classes.json has other classes than manifest.json" in shown
    assert "2 of 20 files in digits are damaged: shard-000003.json, classes.json; run" in shown
    assert "match the manifest" in in_process("verify", *encode_digits, "repair=true")
    assert contents(Path("digits")) == before


def test_a_lock_that_is_a_link_does_not_empty_what_it_points_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (folder / ".encode-0.lock").unlink()
    (folder / ".encode-0.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match=r"\.encode-0\.lock is a link, but it must be a file; remove it"):
        encode(folder)
    assert (tmp_path / "victim").read_text() == "mine"


def test_shards_are_made_in_a_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(
            ValueError, match=f"data.shards {path} is not a folder and cannot be made one; choose another"
        ):
            encode(path)


def test_files_of_other_names_are_left_alone(folder: Path) -> None:
    """Encode where shards of another, unfinished plan are deleted."""
    kept = [folder / "shard-mine.tar", folder / "notes.json", folder / "shard-000099.tar"]
    kept[0].write_text("x")
    kept[1].write_text("x")
    kept[2].mkdir()
    (folder / "shard-000098.tar").write_text("x")
    encode(folder)
    assert all(path.exists() for path in kept)
    assert not (folder / "shard-000098.tar").exists()


def test_latents_that_float16_cannot_hold_are_refused_and_named(tmp_path: Path) -> None:
    class Huge(IdentityAutoencoder):
        def moments(self, images: Any) -> Any:
            return super().moments(images) * 10**6

    with pytest.raises(
        ValueError, match=r"The latent of pattern-\d+ has the value [\d.]+, but .* holds float16, up to 65504"
    ):
        encode_pattern(tmp_path, autoencoder=Huge(1))
