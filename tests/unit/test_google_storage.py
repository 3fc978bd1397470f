"""gs:// gives the same shards and batches as a folder, in no more attempts than requested, on a local server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import encode_pattern, image_encoding, silent_progress
from gcs_server import BUCKET, GcsServer, gcs_server, upload
from pictures import make_image_folder
from test_remote import SHARDS, assert_equal, make, remote_shards
from test_shards import contents
from test_sources import make_tars

from core import remote
from core.remote import Retry
from data.encode import encode
from data.image_folder import ImageFolder
from data.images import CenterCrop
from data.shards import MappedShards
from data.sources import Source
from data.tars import ImageTars
from model.autoencoder import IdentityAutoencoder

QUICK = Retry(attempts=4, first_wait_sec=0.01, timeout_sec=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pattern")
    encode_pattern(path, samples_per_shard=50 // SHARDS)
    return path


@pytest.fixture
def gcs() -> Iterator[GcsServer]:
    with gcs_server() as server:
        yield server


def shards_of(source: Source, folder: Path) -> dict[str, bytes]:
    """Return what the job writes: shards, sidecars, index, manifest."""
    encoding = image_encoding(IdentityAutoencoder(3), 16, flip=True, crop=CenterCrop())
    settings: dict[str, Any] = {"name": "animals", "samples_per_shard": 4, "batch_size": 3, "seed": 0}
    encode(source, encoding, folder, progress=silent_progress, **settings)
    return contents(folder)


def test_images_and_tars_in_a_bucket_are_encoded_to_the_same_bytes(gcs: GcsServer, tmp_path: Path) -> None:
    images, tars = make_image_folder(tmp_path / "images", per_class=2), make_tars(tmp_path / "tars")
    gcs.faults = {"download 001.JPEG": ["503"], "list ": ["503"], "download train-1.tar": ["cut"]}
    in_bucket = ImageFolder(upload(gcs, images, "images"))
    assert shards_of(in_bucket, tmp_path / "a") == shards_of(ImageFolder(str(images)), tmp_path / "b")
    pattern = f"{upload(gcs, tars, 'tars')}/train-{{0..1}}.tar"
    assert shards_of(ImageTars(pattern), tmp_path / "c") == shards_of(ImageTars(str(tars)), tmp_path / "d")
    assert not any(gcs.faults.values())


def test_batches_from_a_bucket_are_those_of_the_folder_at_one_request_a_shard(
    folder: Path, gcs: GcsServer, tmp_path: Path
) -> None:
    local = list(make(MappedShards(folder)).from_step(0, 11))  # two epochs and a half
    url = upload(gcs, folder, "pattern")
    shards = remote_shards(url, tmp_path / "a")
    assert_equal(list(make(shards).from_step(0, 11)), local)
    shards.close()
    files = ["manifest.json", "labels.npz", *(f"shard-{number:06d}.tar" for number in range(SHARDS))]
    assert gcs.calls == {f"download {name}": 1 for name in files}
    resumed = remote_shards(url, tmp_path / "b")
    assert_equal(list(make(resumed).from_step(6, 11)), local[6:])
    resumed.close()


@pytest.mark.parametrize("fault", ["503", "429", "hang", "cut", "flip"])
def test_a_fault_is_met_by_one_more_attempt_of_ours_and_by_none_of_the_clients(
    folder: Path, gcs: GcsServer, tmp_path: Path, fault: str
) -> None:
    names = ["labels.npz", "shard-000003.tar", "shard-000007.tar"] + (["manifest.json"] if fault != "flip" else [])
    gcs.faults = {f"download {name}": [fault, fault] for name in names}
    shards = remote_shards(upload(gcs, folder, "pattern"), tmp_path, retry=QUICK)
    assert_equal(list(make(shards).from_step(0, 5)), list(make(MappedShards(folder)).from_step(0, 5)))
    shards.close()
    assert {gcs.calls[f"download {name}"] for name in names} == {3}


@pytest.mark.parametrize(("fault", "words"), [("503", "HttpError: injected, 503"), ("hang", r"\w*Timeout\w*: .*")])
def test_a_fault_that_stays_costs_as_many_requests_as_attempts_were_asked_for(
    gcs: GcsServer, fault: str, words: str
) -> None:
    gcs.faults = {call: [fault] * 100 for call in ("download a.json", "upload a.json", "list ", "delete a.json")}
    url = f"gs://{BUCKET}/a.json"
    three = Retry(attempts=3, first_wait_sec=0.01, timeout_sec=0.2)
    with pytest.raises(ValueError, match=rf"a.json cannot be read: 3 attempts failed, the last with {words}; check"):
        remote.read_bytes(url, three)
    for action in (
        lambda: remote.write_bytes(url, b"{}", three),
        lambda: remote.remove(url, three),
        lambda: remote.list_names(f"gs://{BUCKET}", three),
    ):
        with pytest.raises(ValueError, match="3 attempts failed"):
            action()
    assert set(gcs.calls.values()) == {3}


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_refusal_is_not_asked_again(gcs: GcsServer, status: str) -> None:
    gcs.faults["download manifest.json"] = [status]
    with pytest.raises(ValueError, match=r"(?s)manifest.json is refused .*; check the credentials"):
        remote.read_bytes(f"gs://{BUCKET}/manifest.json", QUICK)
    assert gcs.calls["download manifest.json"] == 1


def test_an_object_that_was_damaged_or_deleted_is_named(folder: Path, gcs: GcsServer, tmp_path: Path) -> None:
    url = upload(gcs, folder, "pattern")
    gcs.put(BUCKET, "pattern/shard-000003.tar", b"short")
    remote.remove(f"{url}/shard-000007.tar")
    shards = remote_shards(url, tmp_path, retry=QUICK)
    with pytest.raises(ValueError, match=r"shard-00000(3.tar is damaged: the manifest says|7.tar is missing, but)"):
        list(make(shards).from_step(0, 5))
    shards.close()
    with pytest.raises(ValueError, match=f"There is no manifest.json in gs://{BUCKET}/nowhere"):
        remote_shards(f"gs://{BUCKET}/nowhere", tmp_path)
