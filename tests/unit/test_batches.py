"""Batches are a function of positions, whatever the number of processes."""

import itertools
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PatternSource, encode_pattern
from torch.utils._pytree import tree_leaves

import data.mapped_file
from core.deferred import Deferred
from core.draws import Philox, Streams, training_draws
from core.fast_draws import load_draws
from core.philox32 import Philox32, load_philox32
from core.prefetch import prefetch
from data.batches import TrainingBatches
from data.conditions import ClassLabels
from data.images import to_unit_range
from data.order import GlobalOrder
from data.shards import MappedShards
from diffusion.times import UniformSteps
from model.autoencoder import IdentityAutoencoder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> MappedShards:
    folder = tmp_path_factory.mktemp("pattern")
    encode_pattern(folder)
    return MappedShards(folder)


def make(
    shards: MappedShards,
    rank: int = 0,
    world: int = 1,
    flip: bool = True,
    threads: int = 1,
    streams: Callable[[int], Streams] = Philox,
    target_steps: float | None = None,
) -> TrainingBatches:
    return TrainingBatches(
        shards,
        GlobalOrder(0, shards.counts),
        IdentityAutoencoder(1),
        ClassLabels(5),
        seed=0,
        batch_size=12,
        times=UniformSteps(1000),
        class_dropout=0.1,
        flip=flip,
        rank=rank,
        world=world,
        threads=threads,
        streams=streams,
        target_steps=target_steps,
    )


def test_shapes_and_types_are_those_of_the_design(shards: MappedShards) -> None:
    batch = make(shards).batch(0)
    assert batch.x_0.shape == batch.noise.shape == (12, 1, 8, 8)
    assert batch.condition["label"].shape == batch.t.shape == (12,)
    assert batch.x_0.dtype == batch.noise.dtype == torch.float32
    assert batch.condition["label"].dtype == batch.t.dtype == torch.int64


@pytest.mark.parametrize("world", [2, 3, 4])
def test_batches_do_not_depend_on_the_number_of_processes(shards: MappedShards, world: int) -> None:
    for step in (0, 3, 1000):
        whole = make(shards).batch(step)
        parts = [make(shards, rank, world).batch(step) for rank in range(world)]
        for found, *shares in zip(*map(tree_leaves, (whole, *parts)), strict=True):
            assert torch.equal(torch.cat(shares), found)


def test_a_batch_needs_nothing_but_its_step(shards: MappedShards) -> None:
    walked = list(make(shards).from_step(0, 6))[5]
    jumped = make(shards).batch(5)
    assert all(map(torch.equal, tree_leaves(walked), tree_leaves(jumped)))


def test_every_image_is_seen_once_an_epoch_and_flipped_about_half_the_time(shards: MappedShards) -> None:
    source = PatternSource()
    images = torch.cat([to_unit_range(source[i].content[np.newaxis]) for i in range(50)]).half().float()
    both = {False: images, True: images.flip(3)}
    latents = torch.cat([batch.x_0 for batch in make(shards).from_step(0, 25)])[:300]
    found = []
    for latent in latents:
        matches = [(i, flip) for flip, stack in both.items() for i in range(50) if torch.equal(stack[i], latent)]
        assert len(matches) == 1
        found.append(matches[0])
    for epoch in itertools.batched(found, 50) if hasattr(itertools, "batched") else np.array_split(found, 6):
        assert sorted(int(index) for index, _ in epoch) == list(range(50))
    assert 0.4 < np.mean([flip for _, flip in found]) < 0.6


def test_labels_are_the_shards_or_the_null_class(shards: MappedShards) -> None:
    labels = torch.cat([batch.condition["label"] for batch in make(shards).from_step(0, 300)])
    assert set(labels.tolist()) == {0, 1, 2, 3, 4, 5}
    assert 0.07 < (labels == 5).double().mean() < 0.13


def test_nothing_is_flipped_where_the_config_says_so(shards: MappedShards) -> None:
    """Compare with the same positions with flips: the rows are the same, but never mirrored."""
    plain, flipped = make(shards, flip=False).batch(0), make(shards, flip=True).batch(0)
    mirrored = torch.stack([latent.flip(2) for latent in flipped.x_0])
    for one, other, turned in zip(plain.x_0, flipped.x_0, mirrored, strict=True):
        assert torch.equal(one, other) or torch.equal(one, turned)
    assert not torch.equal(plain.x_0, flipped.x_0)


def test_a_batch_that_does_not_divide_is_refused(shards: MappedShards) -> None:
    with pytest.raises(ValueError, match="batch_size 12 is not a multiple of 5 processes"):
        make(shards, world=5)


def test_prefetch_keeps_order_and_hands_on_exceptions() -> None:
    def items() -> Iterator[int]:
        yield from range(20)
        raise OSError("disk gone")

    received: list[int] = []
    with pytest.raises(OSError, match="disk gone"):
        received.extend(prefetch(items()))
    assert received == list(range(20))


def test_prefetch_stops_its_thread_when_the_loop_is_left() -> None:
    before = set(threading.enumerate())  # a test that failed may have left some
    batches = prefetch(itertools.count())
    for item in batches:
        assert {thread.name for thread in set(threading.enumerate()) - before} == {"prefetch"}
        if item == 3:
            break
    del batches
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_the_number_of_threads_changes_no_batch(
    shards: MappedShards, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Compare with the definition of the draws, and with compiled draws."""
    alone = make(shards)
    draws = training_draws(Philox(0), np.arange(36, 48), (1, 8, 8), UniformSteps(1000), 0.1, True)
    moments = shards.gather(alone.order.rows_at(np.arange(36, 48)), draws.flip)
    expected = alone.batch(3)
    assert torch.equal(expected.x_0, torch.from_numpy(moments[:, :1]).float())
    assert torch.equal(expected.noise, torch.from_numpy(draws.noise))
    assert torch.equal(expected.t, torch.from_numpy(draws.t))
    monkeypatch.setattr("core.draws.FAST_DRAWS", Deferred("draws", load_draws, worth=0))
    several = make(shards, threads=threads)
    for step in range(9):
        for one, two in zip(tree_leaves(several.batch(step)), tree_leaves(alone.batch(step)), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("worth", [0, 10**9])
def test_the_generator_of_a_run_draws_all_and_a_batch_does_not_depend_on_how_it_is_divided(
    shards: MappedShards, monkeypatch: pytest.MonkeyPatch, worth: int
) -> None:
    """Compare with the definition, and with processes and threads, compiled and not, in another order of steps."""
    monkeypatch.setattr("core.philox32.FAST_PHILOX32", Deferred("draws", load_philox32, worth=worth))
    draws = training_draws(Philox32(0), np.arange(36, 48), (1, 8, 8), UniformSteps(1000), 0.1, True)
    alone = make(shards, streams=Philox32)
    rows = alone.order.rows_at(np.arange(36, 48))
    assert rows.tolist() == make(shards).order.rows_at(np.arange(36, 48)).tolist()
    found = alone.batch(3)
    assert torch.equal(found.x_0, torch.from_numpy(shards.gather(rows, draws.flip)[:, :1]).float())
    assert torch.equal(found.noise, torch.from_numpy(draws.noise))
    assert torch.equal(found.t, torch.from_numpy(draws.t))
    labels = np.where(draws.dropped, 5, shards.labels_of(rows))
    assert found.condition["label"].tolist() == labels.tolist()
    assert not torch.equal(found.noise, make(shards).batch(3).noise)
    for world, threads in ((1, 1), (1, 3), (2, 1), (3, 2)):
        parts = [make(shards, rank, world, threads=threads, streams=Philox32).batch(3) for rank in range(world)]
        for whole, *shares in zip(tree_leaves(found), *map(tree_leaves, parts), strict=True):
            assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize("worth", [0, 10**9])
def test_a_shard_that_is_cut_during_a_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: int) -> None:
    """Read by a compiled function, and by Python."""
    monkeypatch.setattr(data.mapped_file, "FAST_READS", Deferred("reads", data.mapped_file._load_reads, worth=worth))
    encode_pattern(tmp_path)
    shards = MappedShards(tmp_path)
    shards.gather(np.arange(50), np.zeros(50, dtype=bool))
    assert (data.mapped_file.FAST_READS.get(0) is not None) == (worth == 0)
    os.truncate(tmp_path / "shard-000003.tar", 4096)
    with pytest.raises(ValueError, match=r"shard-000003.tar was cut while this job ran; run the same"):
        shards.gather(np.array([49]), np.array([False]))


def test_compiled_reads_fill_the_same_bytes(shards: MappedShards, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, flips = np.arange(50)[::-1].copy(), np.arange(50) % 3 == 0
    expected = shards.gather(rows, flips)
    monkeypatch.setattr(data.mapped_file, "FAST_READS", Deferred("reads", data.mapped_file._load_reads, worth=0))
    for count in (50, 1, 0):
        out = np.full((count, *expected.shape[1:]), np.nan, np.float16)
        assert shards.gather(rows[:count], flips[:count], out) is out
        np.testing.assert_array_equal(out, expected[:count])
    with pytest.raises(AssertionError, match="a copy would be filled"):
        shards.gather(rows, flips, np.empty((*expected.shape[:3], 16), np.float16)[..., ::2])


def test_more_shards_than_open_files_are_allowed(shards: MappedShards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the limit on open files, since each shard needs two or, where the system forbids that, one; or name it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, limits[1]))
        MappedShards(Path(shards.place))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 2 * 4 + 512
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (518, 518))
    with_one = MappedShards(Path(shards.place))
    rows, flips = np.arange(50), np.arange(50) % 2 == 0
    expected, open_before = shards.gather(rows, flips), len(list(Path("/proc/self/fd").iterdir()))
    np.testing.assert_array_equal(with_one.gather(rows, flips), expected)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before + 4
    monkeypatch.setattr(resource, "getrlimit", lambda _: (300, 400))
    with pytest.raises(
        ValueError, match="4 files of shards need 516 open files, but this system allows 400; raise `ulimit -n`"
    ):
        MappedShards(Path(shards.place))
