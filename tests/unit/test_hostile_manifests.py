"""The content of untrusted manifests and caches is data, never a trusted path or number."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import silent_progress
from faulty_server import FaultyServer

from core.atomic import write_bytes
from core.names import UnsafeNameError
from core.reading import DamagedFileError
from core.records import SEAL, seal
from core.remote import Retry
from data.cache import Cache, CachedFile
from data.manifest import MAX_MANIFEST_BYTES, Manifest
from data.shards import MappedShards
from data.verify import verify

QUICK = Retry(attempts=1, timeout_sec=5)
ENDLESS = 10**12


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and update its hash."""
    content = json.loads((folder / "manifest.json").read_text())
    del content[SEAL]
    change(content)
    (folder / "manifest.json").write_text(json.dumps(seal(content)))


def test_the_identity_of_data_is_what_it_was_before_manifests_had_a_hash(tmp_path: Path) -> None:
    """Check it also for a scale that was written as an integer."""
    text = """{
 "format_version": 2,
 "plan_hash": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
 "spec": {
  "source": "x",
  "image_size": 8,
  "autoencoder": "identity",
  "autoencoder_revision": "1",
  "scale": 1,
  "downscale": 1,
  "channels": 1,
  "dtype": "float16",
  "flip": false,
  "num_classes": 1,
  "shift": [
   0.25
  ],
  "precision": "fp32",
  "crop": "none",
  "apply_exif": false
 },
 "class_names": [
  "caf\\u00e9"
 ],
 "shards": [
  {
   "name": "shard-000000.tar",
   "count": 1,
   "bytes": 10240,
   "sha256": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
  }
 ],
 "index_sha256": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
 "latent_mean": [
  -0.17647057017311454
 ],
 "latent_std": [
  1e-05
 ],
 "num_skipped": 0
}"""
    (tmp_path / "manifest.json").write_text(text)
    old = Manifest.load(tmp_path)
    assert old.hash == "6aadf6307b1fb480337ef114e2c1d27e3db85600a8395951c86f8e4767df4b29"
    old.save(tmp_path)
    assert SEAL in json.loads((tmp_path / "manifest.json").read_text())
    assert Manifest.load(tmp_path).hash == old.hash


NAMES = [
    "../victim/data.tar",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a/b.tar",
    ".hidden.tar",
    "a\\b.tar",
    "a\n.tar",
    "x" * 300 + ".tar",
    "shard-000001.tar",  # the name of another
    "index.npz",
    "shard.tar?token",
    "",
    None,
    7,
]


@pytest.mark.parametrize("name", NAMES)
def test_only_names_of_shards_become_paths(folder: Path, name: object) -> None:
    rewrite(folder, lambda content: content["shards"][0].update(name=name))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        MappedShards(folder)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        verify(folder, silent_progress)


CAPTIONS = {"sha256": "0" * 64, "bytes": 1000, "count": 50}
MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a count below zero": lambda content: content["shards"][0].update(count=-1),
    "a count in quotes": lambda content: content["shards"][0].update(count="16"),
    "a huge count": lambda content: content["shards"][0].update(count=ENDLESS),
    "more samples than bytes": lambda content: content["shards"][0].update(count=1000),
    "a null count": lambda content: content["shards"][0].update(count=None),
    "no bytes": lambda content: content["shards"][0].update(bytes=0),
    "a hash that is a path": lambda content: content["shards"][0].update(sha256="../../victim/data"),
    "a hash in capitals": lambda content: content["shards"][0].update(sha256="AB" * 32),
    "no shards": lambda content: content.update(shards=[]),
    "null shards": lambda content: content.update(shards=None),
    "null spec": lambda content: content.update(spec=None),
    "no index": lambda content: content.pop("index_sha256"),
    "captions that are a number": lambda content: content.update(captions=7),
    "fewer captions than samples": lambda content: content.update(captions={**CAPTIONS, "count": 49}),
    "captions of no size": lambda content: content.update(captions={**CAPTIONS, "bytes": 0}),
    "captions elsewhere": lambda content: content.update(captions={**CAPTIONS, "name": "../captions.npz"}),
    "a hash of captions that is a path": lambda content: content.update(captions={**CAPTIONS, "sha256": "../x"}),
    "a hash of labels that is a number": lambda content: content.update(labels_sha256=7),
    "another type": lambda content: content["spec"].update(dtype="object"),
    "no downscale": lambda content: content["spec"].update(downscale=0),
    "a downscale that does not divide": lambda content: content["spec"].update(downscale=3),
    "a huge image": lambda content: content["spec"].update(image_size=ENDLESS),
    "no channels": lambda content: content["spec"].update(channels=0),
    "scales of other channels": lambda content: content["spec"].update(scale=[1.0, 2.0]),
    "a scale in quotes": lambda content: content["spec"].update(scale="1"),
    "a shift that is a list of lists": lambda content: content["spec"].update(shift=[[0.0]]),
    "a class too few": lambda content: content["class_names"].pop(),
    "a class that is a number": lambda content: content["class_names"].__setitem__(0, 7),
    "statistics of other channels": lambda content: content.update(latent_mean=[0.0, 0.0]),
    "a negative deviation": lambda content: content.update(latent_std=[-1.0]),
    "skipped below zero": lambda content: content.update(num_skipped=-1),
    "a foreign field": lambda content: content.update(note="x"),
    "a foreign field of a shard": lambda content: content["shards"][0].update(url="http://x"),
    "a version in quotes": lambda content: content.update(format_version="2"),
}


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_manifest_of_another_form_is_refused(folder: Path, change: str) -> None:
    rewrite(folder, MANIFESTS[change])
    with pytest.raises(
        DamagedFileError, match=r"manifest\.json is damaged: .*; delete it and run `ditscale encode` again"
    ):
        MappedShards(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, sound: Path) -> None:
    for name in ("shard-000000.tar", "labels.npz", "manifest.json"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).symlink_to(sound / name)
        with pytest.raises(UnsafeNameError, match=f"{name}, which .* names, is a link out of"):
            MappedShards(folder)
        (folder / name).unlink()
        (folder / f"near {name}").write_bytes(kept)
        (folder / name).symlink_to(f"near {name}")
    assert len(MappedShards(folder)) == 50


def served(folder: Path, cache: Path) -> MappedShards:
    with FaultyServer(folder).running() as server:
        shards = MappedShards(server.url, True, Cache(cache, 10**9, patience_sec=5), QUICK)
        shards.gather(np.arange(50), np.zeros(50, dtype=bool))
        shards.close()
        return shards


def test_a_hash_of_a_remote_manifest_names_no_file_elsewhere(folder: Path, tmp_path: Path) -> None:
    """Refuse the issue's case, which deleted ``victim/data.tar``."""
    victim = tmp_path / "victim/data.tar"
    write_bytes(victim, b"mine")
    rewrite(folder, lambda content: content["shards"][0].update(sha256="../../victim/data"))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: shards\.0\.sha256 is '../../victim/data', but"):
        served(folder, tmp_path / "a/cache")
    with pytest.raises(UnsafeNameError, match="64 hexadecimal digits"):
        Cache(tmp_path / "a/cache", 100).map(CachedFile("../../victim/data", 10), lambda path: None, verify=True)
    assert victim.read_bytes() == b"mine"


def test_a_remote_manifest_or_index_without_end_is_not_read_whole(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / "labels.npz", 10**6)
    with pytest.raises(ValueError, match=r"labels\.npz has 1000000 bytes or more, but at most \d{5} are read"):
        served(folder, tmp_path / "cache")
    os.truncate(folder / "manifest.json", MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ValueError, match=r"manifest\.json has \d+ bytes or more, but at most .*copy it there again"):
        served(folder, tmp_path / "cache")


def test_files_of_other_names_in_a_cache_are_left_alone(folder: Path, tmp_path: Path) -> None:
    """Use a folder of other files as a cache, and fill it with our files only."""
    cache = tmp_path / "cache"
    cache.mkdir()
    mine = ["data.tar", "x.tar", ".data.7.reserved", f".{'a' * 64}.reserved", "A" * 64 + ".tar", ".x.part"]
    for name in mine:
        (cache / name).write_bytes(b"x" * 1000)
    os.mkfifo(cache / "pipe.tar")
    (cache / "dangling.tar").symlink_to("nothing")
    shard_bytes = Manifest.load(folder).shards[0].bytes
    with FaultyServer(folder).running() as server:
        shards = MappedShards(server.url, True, Cache(cache, shard_bytes + 1, patience_sec=5), QUICK)
        for row in (0, 20, 40):  # each takes the place of the one before
            shards.gather(np.array([row]), np.zeros(1, dtype=bool))
        shards.close()
    assert all((cache / name).read_bytes() == b"x" * 1000 for name in mine)
    assert (cache / "pipe.tar").is_fifo()
    assert (cache / "dangling.tar").is_symlink()


@pytest.mark.parametrize("suffix", [".tar", ".reserved", ".part"])
def test_what_is_no_file_gives_way_in_a_cache(folder: Path, tmp_path: Path, suffix: str) -> None:
    """Replace pipes and links that have the names of our files, and name a folder."""
    cache, entries = tmp_path / "cache", Manifest.load(folder).shards
    cache.mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")

    def place(number: int) -> Path:
        entry = entries[number]
        return cache / (f"{entry.sha256}.tar" if suffix == ".tar" else f".{entry.sha256}.{entry.bytes}{suffix}")

    os.mkfifo(place(0))
    place(1).symlink_to(victim)
    place(2).symlink_to("/dev/zero")
    assert len(served(folder, cache)) == 50
    assert victim.read_bytes() == b"mine"
    assert {path.name for path in cache.iterdir()} == {".lock", *(f"{entry.sha256}.tar" for entry in entries)}
    shutil.rmtree(cache)
    place(0).mkdir(parents=True)
    with pytest.raises(
        ValueError, match=f"{place(0).name} is a folder, but a file of that name is written there; remove"
    ):
        served(folder, cache)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("victim"), lambda path: path.mkdir()])
def test_the_lock_of_a_cache_is_a_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    (tmp_path / "victim").write_text("mine")
    make(tmp_path / ".lock")
    with pytest.raises(DamagedFileError, match=r"\.lock is a .*, but it must be a file; remove it"):
        Cache(tmp_path, 100)
    assert (tmp_path / "victim").read_text() == "mine"
