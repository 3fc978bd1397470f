"""Shards behind URLs give the same batches as a folder, whatever the network does."""

import hashlib
import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from conftest import encode_pattern
from faulty_server import FaultyServer
from gcs_server import gcs_server
from s3_server import BUCKET, s3_server, upload
from torch.utils._pytree import tree_leaves

from core import remote
from core.atomic import write_bytes
from core.batch import Batch
from core.prefetch import prefetch
from core.reading import sha256_of
from core.remote import Retry
from data.batches import TrainingBatches
from data.cache import Cache, CachedFile
from data.conditions import ClassLabels
from data.order import GlobalOrder, Order, WindowedOrder
from data.shard_files import FetchedAhead
from data.shards import MappedShards
from diffusion.times import UniformSteps
from launch.command.app import CONF
from model.autoencoder import IdentityAutoencoder

QUICK = Retry(attempts=4, first_wait_sec=0.01, timeout_sec=0.3)
PER_SHARD, SHARDS = 5, 10  # the pattern's 50 samples
ROOM = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pattern")
    encode_pattern(path, samples_per_shard=PER_SHARD)
    return path


@pytest.fixture(scope="module")
def shard_bytes(folder: Path) -> int:
    (size,) = {path.stat().st_size for path in folder.glob("*.tar")}
    return size


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the server's URL, and the URL of the shards in its bucket."""
    with s3_server() as server:
        yield server, upload(folder, "pattern")


@pytest.fixture
def web(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder).running() as server:
        yield server


def windowed(counts: list[int]) -> Order:
    return WindowedOrder(0, counts, 2)


def everything(counts: list[int]) -> Order:
    return GlobalOrder(0, counts)


def make(
    shards: MappedShards, order: Callable[[list[int]], Order] = windowed, rank: int = 0, world: int = 1
) -> TrainingBatches:
    return make_with(shards, order(shards.counts), 12, rank, world)


def make_with(shards: MappedShards, order: Order, batch_size: int, rank: int, world: int) -> TrainingBatches:
    return TrainingBatches(
        shards,
        order,
        IdentityAutoencoder(1),
        ClassLabels(5),
        seed=0,
        batch_size=batch_size,
        times=UniformSteps(1000),
        class_dropout=0.1,
        flip=True,
        rank=rank,
        world=world,
    )


def remote_shards(
    url: str, cache: Path, limit_bytes: int = ROOM, retry: Retry = QUICK, verify: bool = True
) -> MappedShards:
    return MappedShards(url, verify, Cache(cache, limit_bytes, patience_sec=20), retry)


def assert_equal(one: list[Batch], two: list[Batch]) -> None:
    assert len(one) == len(two) > 0
    for left, right in zip(one, two, strict=True):
        assert all(map(torch.equal, tree_leaves(left), tree_leaves(right)))


def cached_bytes(cache: Path) -> int:
    """Return the bytes on disk in a cache, including temporary files, which may disappear during the count."""
    total = 0
    for path in cache.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("order", [windowed, everything])
def test_batches_from_s3_are_those_of_the_folder_also_from_the_middle_of_an_epoch(
    folder: Path, s3: tuple[str, str], tmp_path: Path, order: Callable[[list[int]], Order]
) -> None:
    local = list(make(MappedShards(folder), order).from_step(0, 11))  # two epochs and a half, windows straddled
    shards = remote_shards(s3[1], tmp_path / "a", retry=Retry())
    assert_equal(list(make(shards, order).from_step(0, 11)), local)
    shards.close()
    resumed = remote_shards(s3[1], tmp_path / "b", retry=Retry())
    assert_equal(list(make(resumed, order).from_step(6, 11)), local[6:])
    resumed.close()


def test_batches_from_http_are_those_of_the_folder_whatever_the_processes(
    folder: Path, web: FaultyServer, tmp_path: Path
) -> None:
    local = list(make(MappedShards(folder)).from_step(0, 9))
    parts = []
    for rank in range(3):
        shards = remote_shards(web.url, tmp_path)
        parts.append(list(make(shards, rank=rank, world=3).from_step(0, 9)))
        shards.close()
    for step, whole in enumerate(local):
        for found, *shares in zip(tree_leaves(whole), *(tree_leaves(part[step]) for part in parts), strict=True):
            assert torch.equal(torch.cat(shares), found)
    assert {web.gets[f"shard-{number:06d}.tar"] for number in range(SHARDS)} == {1}


def test_rows_that_nobody_announced_can_be_read_too(folder: Path, web: FaultyServer, tmp_path: Path) -> None:
    shards = remote_shards(web.url, tmp_path)
    rows, flips = np.arange(50), np.arange(50) % 2 == 0
    np.testing.assert_array_equal(shards.gather(rows, flips), MappedShards(folder).gather(rows, flips))
    assert shards.source_ids.tolist() == MappedShards(folder).source_ids.tolist()
    shards.close()


@pytest.mark.parametrize("fault", ["500", "hang", "cut", "flip", "short"])
def test_a_fault_is_tried_again_and_changes_no_batch(
    folder: Path, web: FaultyServer, tmp_path: Path, fault: str
) -> None:
    local = list(make(MappedShards(folder)).from_step(0, 5))
    for name in ("manifest.json", "labels.npz", "shard-000003.tar", "shard-000007.tar"):
        # A manifest with other bytes is refused, not asked for again: nothing says what it should be.
        web.faults[name] = [] if name == "manifest.json" and fault in ("flip", "short") else [fault, fault]
    shards = remote_shards(web.url, tmp_path)
    assert_equal(list(make(shards).from_step(0, 5)), local)
    shards.close()
    assert {web.gets[name] for name in ("labels.npz", "shard-000003.tar", "shard-000007.tar")} == {3}


@pytest.mark.parametrize("fault", ["500", "hang", "cut"])
def test_a_fault_of_s3_is_tried_again_and_changes_no_batch(
    folder: Path, s3: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    local = list(make(MappedShards(folder)).from_step(0, 5))
    with FaultyServer(upstream=s3[0]).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        fsspec.filesystem("s3").clear_instance_cache()
        proxy.faults = {name: [fault, fault] for name in ("manifest.json", "shard-000003.tar", "shard-000007.tar")}
        shards = remote_shards(s3[1], tmp_path, retry=Retry(attempts=4, first_wait_sec=0.01, timeout_sec=1.0))
        assert_equal(list(make(shards).from_step(0, 5)), local)
        shards.close()
        assert proxy.gets["shard-000003.tar"] == 3
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            "500",
            r"shard-000003.tar cannot be read: 4 attempts failed, the last with ClientResponseError: 500, .*; check",
        ),
        (
            "hang",
            r"shard-000003.tar cannot be read: 4 attempts failed, the last with \w*Timeout\w*: .*; check the network",
        ),
        (
            "flip",
            r"shard-000003.tar is damaged: the manifest says sha256 \w{64}, the file has \w{64}; copy it there again",
        ),
        (
            "short",
            r"shard-000003.tar is damaged: the manifest says \d+ bytes, the file has \d+; copy it there again",
        ),
    ],
)
def test_a_fault_that_stays_ends_in_one_sentence(web: FaultyServer, tmp_path: Path, fault: str, words: str) -> None:
    web.faults["shard-000003.tar"] = [fault] * 100
    shards = remote_shards(web.url, tmp_path)
    with pytest.raises(ValueError, match=words):
        list(make(shards).from_step(0, 5))
    shards.close()
    assert web.gets["shard-000003.tar"] in (4, 8)  # what failed ahead of need is tried again when it is needed


def test_what_failed_ahead_of_need_is_tried_again_when_it_is_needed() -> None:
    """Keep the store away for longer than the retries last, and bring it back in time."""
    came_back = threading.Event()

    def fetch(shard: int) -> mmap.mmap:
        if shard == 4:  # the only thread has done with the other
            came_back.set()
        elif not came_back.is_set():
            raise ValueError("away")
        return mmap.mmap(-1, shard)

    ahead = FetchedAhead(fetch, num_threads=1)
    ahead.want([3, 4])
    assert came_back.wait(10)
    assert len(ahead.get(3)) == 3
    ahead.close()


def test_a_refusal_is_not_asked_again(web: FaultyServer) -> None:
    web.faults["manifest.json"] = ["403"]
    with pytest.raises(
        ValueError, match=r"manifest.json is refused \(ClientResponseError: 403.*; check the credentials"
    ):
        remote.read_bytes(f"{web.url}/manifest.json", QUICK)
    assert web.gets["manifest.json"] == 1


def test_an_object_that_was_damaged_or_deleted_is_named(folder: Path, s3: tuple[str, str], tmp_path: Path) -> None:
    url = upload(folder, "damaged")
    remote.write_bytes(f"{url}/shard-000004.tar", bytes((folder / "shard-000004.tar").stat().st_size))
    remote.remove(f"{url}/shard-000006.tar")
    shards = remote_shards(url, tmp_path)
    for number, words in ((4, "is damaged: the manifest says sha256"), (6, "is missing, but the manifest lists it")):
        rows = np.array([number * PER_SHARD])
        with pytest.raises(ValueError, match=rf"{url}/shard-00000{number}.tar {words}.*copy it there again"):
            shards.gather(rows, np.array([False]))
    shards.close()
    with pytest.raises(ValueError, match=f"There is no manifest.json in s3://{BUCKET}/nowhere"):
        remote_shards(f"s3://{BUCKET}/nowhere", tmp_path)


@pytest.mark.parametrize(
    ("damage", "verify"),
    [(lambda content: content[:-1] + b"x", True), (lambda content: content[:700], False)],
    ids=["content", "size"],
)
def test_a_damaged_file_of_the_cache_is_fetched_again(
    folder: Path, web: FaultyServer, tmp_path: Path, damage: Callable[[bytes], bytes], verify: bool
) -> None:
    """Detect a wrong size even where contents are not read."""
    first = remote_shards(web.url, tmp_path)
    local = list(make(first).from_step(0, 5))
    first.close()
    damaged = sorted(tmp_path.glob("*.tar"))[:3]
    for path in damaged:
        path.write_bytes(damage(path.read_bytes()))
    before = web.gets.total()
    again = remote_shards(web.url, tmp_path, verify=verify)
    assert_equal(list(make(again).from_step(0, 5)), local)
    again.close()
    assert web.gets.total() == before + 3 + len(["manifest", "index"])
    assert [sha256_of(path) for path in damaged] == [path.stem for path in damaged]


def test_the_cache_never_takes_more_than_its_bytes(
    folder: Path, web: FaultyServer, tmp_path: Path, shard_bytes: int
) -> None:
    limit = 4 * shard_bytes + 100  # two windows of two shards
    cache = tmp_path / "cache"
    shards = remote_shards(web.url, cache, limit)
    largest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            largest[0] = max(largest[0], cached_bytes(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    batches = list(make(shards).from_step(0, 26))
    stop.set()
    watcher.join()
    assert_equal(batches, list(make(MappedShards(folder)).from_step(0, 26)))
    assert 3 * shard_bytes <= largest[0] <= limit
    whole_epochs, fetched = 26 * 12 // 50, web.gets.total() - len(["manifest", "index"])
    assert (whole_epochs - 1) * (SHARDS - 4) < fetched  # so it did evict
    assert fetched <= (whole_epochs + 1) * SHARDS + 2  # and fetched a shard once an epoch, and one window ahead
    shards.close()


def test_a_cache_too_small_for_two_windows_is_refused_with_both_numbers(
    web: FaultyServer, tmp_path: Path, shard_bytes: int
) -> None:
    limit = 4 * shard_bytes - 1
    shards = remote_shards(web.url, tmp_path, limit)
    with pytest.raises(
        ValueError, match=f"data.cache_bytes is {limit}, but the 4 shards .* have {4 * shard_bytes} bytes"
    ):
        make(shards)
    with pytest.raises(ValueError, match=f"but the 10 shards .* have {10 * shard_bytes} bytes"):
        make(shards, everything)
    with pytest.raises(ValueError, match="but the 10 shards"):  # batches of 12 in windows of 10: far apart
        make(shards, world=2)
    shards.close()


READER = """
import sys
from pathlib import Path
import torch
from torch.utils._pytree import tree_leaves
from data.batches import TrainingBatches
from data.cache import Cache
from data.conditions import ClassLabels
from data.order import WindowedOrder
from core.prefetch import prefetch
from data.shards import MappedShards
from diffusion.times import UniformSteps
from model.autoencoder import IdentityAutoencoder
url, cache, limit_bytes, steps, out = sys.argv[1:]
shards = MappedShards(url, cache=Cache(Path(cache), int(limit_bytes), patience_sec=30))
settings = dict(seed=0, batch_size=12, times=UniformSteps(1000), class_dropout=0.1, flip=True)
order, labels = WindowedOrder(0, shards.counts, 2), ClassLabels(5)
batches = TrainingBatches(shards, order, IdentityAutoencoder(1), labels, **settings)
torch.save([tree_leaves(batch) for batch in prefetch(batches.from_step(0, int(steps)))], out)
"""


def start_reader(url: str, cache: Path, limit: int, steps: int, out: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", READER, url, str(cache), str(limit), str(steps), str(out)]
    return subprocess.Popen(words, cwd=CONF.parent, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_one_cache_and_fetch_each_shard_once(
    folder: Path, web: FaultyServer, tmp_path: Path
) -> None:
    local = list(make(MappedShards(folder)).from_step(0, 9))
    readers = [start_reader(web.url, tmp_path / "cache", ROOM, 9, tmp_path / f"{i}.pt") for i in range(2)]
    for number, reader in enumerate(readers):
        assert reader.wait(120) == 0, reader.stderr and reader.stderr.read()
        assert_equal(torch.load(tmp_path / f"{number}.pt", weights_only=True), local)
    assert {web.gets[f"shard-{number:06d}.tar"] for number in range(SHARDS)} == {1}


def test_processes_of_one_run_need_no_more_room_than_was_asked_of_them(
    folder: Path, web: FaultyServer, tmp_path: Path, shard_bytes: int
) -> None:
    """Run two in step, as in training, each with batches prepared ahead, and the smallest cache that is accepted."""
    order, settings = WindowedOrder(0, [PER_SHARD] * SHARDS, 1), {"batch_size": 2, "world": 2}
    steps, limit = 60, 4 * shard_bytes  # windows of 5: two, and two more for 4 batches of 2
    with pytest.raises(ValueError, match="but the 4 shards"):
        make_with(remote_shards(web.url, tmp_path / "small", limit - 1), order, rank=0, **settings)
    in_step, found = threading.Barrier(2), [[], []]  # type: ignore[var-annotated]

    def work(rank: int) -> None:
        shards = remote_shards(web.url, tmp_path / "cache", limit)
        for batch in prefetch(make_with(shards, order, rank=rank, **settings).from_step(0, steps)):
            found[rank].append(batch)
            in_step.wait(30)
        shards.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    local = MappedShards(folder)
    for rank in range(2):
        assert_equal(found[rank], list(make_with(local, order, rank=rank, **settings).from_step(0, steps)))


def test_a_reader_that_was_killed_holds_nothing(
    folder: Path, web: FaultyServer, tmp_path: Path, shard_bytes: int
) -> None:
    """Kill it during a fetch: mapped files can be evicted, reserved space is free, and partial files are deleted."""
    cache, limit = tmp_path / "cache", 4 * shard_bytes
    web.faults["shard-000003.tar"] = ["hang"] * 50
    reader = start_reader(web.url, cache, limit, 9, tmp_path / "none.pt")
    deadline = time.monotonic() + 60
    while not web.gets["shard-000003.tar"]:
        assert time.monotonic() < deadline
        assert reader.poll() is None
        time.sleep(0.01)
    reader.kill()
    reader.wait(10)
    assert list(cache.glob(".*.reserved"))
    web.faults.clear()
    shards = remote_shards(web.url, cache, limit)
    assert_equal(list(make(shards).from_step(0, 9)), list(make(MappedShards(folder)).from_step(0, 9)))
    shards.close()
    assert cached_bytes(cache) <= limit
    while any(path.suffix in (".part", ".reserved") for path in cache.iterdir()):  # of the last fetch ahead
        assert time.monotonic() < deadline + 60
        time.sleep(0.01)


def test_a_file_in_use_is_never_evicted_and_waiting_for_room_ends_in_a_sentence(tmp_path: Path) -> None:
    contents = [bytes([number]) * 1000 for number in range(3)]
    files = [CachedFile(hashlib.sha256(content).hexdigest(), 1000) for content in contents]

    def map_in(cache: Cache, number: int) -> mmap.mmap:
        return cache.map(files[number], lambda path: write_bytes(path, contents[number]), verify=True)

    held = [map_in(Cache(tmp_path, 2000), number) for number in (0, 1)]
    other = Cache(tmp_path, 2000, patience_sec=0.2)
    with pytest.raises(
        ValueError, match=r"has no room for 1000 more bytes: of its 2000, 2000 are .*raise data.cache_by"
    ):
        map_in(other, 2)
    assert [bytes(mapped) for mapped in held] == contents[:2]
    del held[0]
    assert bytes(map_in(other, 2)) == contents[2]
    assert sorted(path.stem for path in tmp_path.glob("*.tar")) == sorted(file.sha256 for file in files[1:])


@pytest.mark.parametrize(("protocol", "server"), [("s3", s3_server), ("gs", gcs_server)])
def test_small_files_are_written_listed_read_and_removed(
    protocol: str, server: Callable[[], AbstractContextManager[object]]
) -> None:
    with server():
        write_list_read_and_remove(f"{protocol}://{BUCKET}/small")


def write_list_read_and_remove(url: str) -> None:
    assert remote.list_names(url) == []
    for name in ("b.json", "a.json"):
        remote.write_bytes(remote.join(url, name), name.encode())
    assert remote.list_names(url) == ["a.json", "b.json"]
    assert remote.read_bytes(f"{url}/a.json") == b"a.json"
    remote.remove(f"{url}/a.json")
    assert remote.list_names(url) == ["b.json"]
    with pytest.raises(FileNotFoundError):
        remote.read_bytes(f"{url}/a.json")
    assert remote.is_remote(url)
    assert not remote.is_remote(Path("shards/digits"))


def test_a_protocol_without_its_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("s3fs", "gcsfs", "gcsfs.core"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "core.google_storage", raising=False)
    for name in ("s3", "gs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, name, raising=False)
    with pytest.raises(ValueError, match=r"s3://a/b needs the Python package s3fs, .*; run `pip install s3fs`"):
        remote.read_bytes("s3://a/b")
    with pytest.raises(ValueError, match=r"gs://a/b needs the Python package gcsfs, .*; run `pip install gcsfs`"):
        remote.read_bytes("gs://a/b")
    with pytest.raises(
        ValueError, match=r"ftp://a has the protocol ftp://, but files are read from s3://, gs://, http"
    ):
        remote.read_bytes("ftp://a")


def test_closing_ends_the_threads_though_a_fetch_hangs(web: FaultyServer, tmp_path: Path) -> None:
    web.faults["shard-000003.tar"] = ["500"] * 100
    patient = Retry(attempts=100, first_wait_sec=30, timeout_sec=0.3)
    before = {thread.ident for thread in threading.enumerate()}
    shards = remote_shards(web.url, tmp_path, retry=patient)
    shards.expect([3])
    while not web.gets["shard-000003.tar"]:
        time.sleep(0.01)
    shards.close()
    for thread in threading.enumerate():
        if thread.name == "fetch" and thread.ident not in before:
            thread.join(5)
            assert not thread.is_alive()
