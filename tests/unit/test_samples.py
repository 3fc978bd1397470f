"""One compiled call fills the same batches as the parts that it calls, and is done without where a part is missing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import encode_pattern
from small_teacher import DIM, encode_with_teacher, small_teacher
from torch import Tensor
from torch.utils._pytree import tree_leaves

import core.draws
import core.latents
import core.philox32
import core.samples
import data.mapped_file
from core.deferred import Deferred
from core.draws import Philox, Streams, training_draws
from core.fast_draws import load_draws
from core.latents import compiled_latents, drawn_latents, load_latents
from core.philox32 import Philox32, load_philox32
from core.samples import Latents
from data.batches import TrainingBatches
from data.conditions import ClassLabels
from data.order import GlobalOrder, WindowedOrder
from data.shards import MappedShards
from diffusion.times import UniformSteps
from model.autoencoder import Autoencoder, IdentityAutoencoder

SHIFT, SCALE = torch.full((1, 1, 1, 1), 0.1), torch.full((1, 1, 1, 1), 0.7)
GENERATORS = [Philox, Philox32]


class Posterior(IdentityAutoencoder):
    """An autoencoder that draws as a VAE does, from the image and a log-variance that depends on it."""

    def moments(self, images: Tensor) -> Tensor:
        return torch.cat([images, images * 3 - 1], dim=1)

    def draw(self, moments: Tensor, posterior: Tensor, out: Tensor | None = None) -> Tensor:
        return drawn_latents(moments, posterior, SHIFT, SCALE, out)

    def compiled_draw(self) -> Latents | None:
        return compiled_latents(SHIFT, SCALE)


PARTS = {
    "draws": (core.draws, "FAST_DRAWS", load_draws),
    "philox32": (core.philox32, "FAST_PHILOX32", load_philox32),
    "latents": (core.latents, "FAST_LATENTS", load_latents),
    "reads": (data.mapped_file, "FAST_READS", data.mapped_file._load_reads),
}


class Calls:
    """Counts the rows that compiled calls filled."""

    rows = 0

    def load(self) -> core.samples.CompiledSamples:
        compiled = core.samples._load_samples()

        def fill_samples(*inputs: Any) -> int:
            stop = compiled.fill_samples(*inputs)
            self.rows += stop - inputs[-2]
            return stop

        return compiled._replace(fill_samples=fill_samples)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Let all parts be compiled, and small chunks be filled at once."""
    found = Calls()
    for place, name, load in PARTS.values():
        monkeypatch.setattr(place, name, Deferred(name, load, worth=0))
    monkeypatch.setattr(core.samples, "FAST_SAMPLES", Deferred("batches", found.load, worth=0))
    monkeypatch.setattr("data.batches.CHUNK", 3)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posterior")
    encode_pattern(folder, autoencoder=Posterior(1))
    return folder


def make(
    shards: MappedShards, streams: Callable[[int], Streams] = Philox32, window: int | None = None, **changes: Any
) -> TrainingBatches:
    order = WindowedOrder(0, shards.counts, window) if window else GlobalOrder(0, shards.counts)
    autoencoder: Autoencoder = changes.pop("autoencoder", Posterior(1))
    settings: dict[str, Any] = {"seed": 0, "batch_size": 12, "class_dropout": 0.1, "flip": True}
    settings |= {"times": UniformSteps(1000), "streams": streams} | changes
    return TrainingBatches(shards, order, autoencoder, ClassLabels(5), **settings)


@pytest.mark.parametrize("streams", GENERATORS)
def test_latents_and_noise_are_those_of_their_definition(
    folder: Path, calls: Calls, streams: Callable[[int], Streams]
) -> None:
    shards, positions = MappedShards(folder), np.arange(36, 48)
    batches = make(shards, streams)
    found = batches.batch(3)
    assert calls.rows == 12
    draws = training_draws(streams(0), positions, (1, 8, 8), UniformSteps(1000), 0.1, True)
    moments = torch.from_numpy(shards.gather(batches.order.rows_at(positions), draws.flip))
    mean, log_variance = moments.float().chunk(2, dim=1)
    latents = (mean + torch.exp(0.5 * log_variance) * torch.from_numpy(draws.posterior) - SHIFT) * SCALE
    assert torch.equal(found.x_0, latents)
    assert torch.equal(found.noise, torch.from_numpy(draws.noise))


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("streams", GENERATORS)
def test_batches_are_those_of_earlier_versions_for_any_number_of_threads_and_processes(
    folder: Path, calls: Calls, streams: Callable[[int], Streams], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare over two epochs, with batches that straddle epochs and windows, and samples chosen one batch ahead."""
    with monkeypatch.context() as patch:
        patch.setattr(core.samples, "FAST_SAMPLES", Deferred("batches", lambda: None, worth=0))
        one_by_one = list(map(make(MappedShards(folder), streams, window).batch, range(9)))
    assert not calls.rows
    monkeypatch.setattr("data.batches.AHEAD", 24)
    for world, threads in ((1, 1), (1, 5), (2, 2)):
        ranks = [
            make(MappedShards(folder), streams, window, rank=r, world=world, threads=threads) for r in range(world)
        ]
        calls.rows = 0
        for expected, *parts in zip(one_by_one, *(batches.from_step(0, 9) for batches in ranks), strict=True):
            for whole, *shares in zip(tree_leaves(expected), *map(tree_leaves, parts), strict=True):
                assert torch.equal(torch.cat(shares), whole)
        assert calls.rows == 9 * 12


@pytest.mark.parametrize("missing", ["philox32", "latents", "reads"])
def test_without_one_of_the_parts_the_others_are_called_one_by_one_and_nothing_is_said(
    folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    expected = make(MappedShards(folder)).batch(3)
    assert calls.rows == 12
    place, name, load = PARTS[missing]
    monkeypatch.setattr(place, name, Deferred(name, load, worth=10**9))
    found = make(MappedShards(folder)).batch(3)
    assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))
    assert calls.rows == 12
    assert capsys.readouterr().out == ""


def test_where_the_loop_cannot_be_compiled_one_note_says_so_and_batches_are_the_same(
    folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = make(MappedShards(folder)).batch(3)

    def load() -> core.samples.CompiledSamples:
        raise RuntimeError("no such intrinsic")

    monkeypatch.setattr(core.samples, "FAST_SAMPLES", Deferred("batches", load, 0, core.samples.SLOWER))
    batches = make(MappedShards(folder), threads=3)
    found = [batches.batch(step) for step in (2, 3)][1]
    assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))
    assert capsys.readouterr().out == f"note: batches are not compiled, and {core.samples.SLOWER}: no such intrinsic.\n"


def test_an_autoencoder_that_offers_nothing_draws_itself(folder: Path, calls: Calls) -> None:
    shards = MappedShards(folder)
    batches = make(shards, autoencoder=IdentityAutoencoder(1))
    found = batches.batch(0)
    flips = training_draws(Philox32(0), np.arange(12), (1, 8, 8), UniformSteps(1000), 0.1, True).flip
    moments = shards.gather(batches.order.rows_at(np.arange(12)), flips)
    assert torch.equal(found.x_0, torch.from_numpy(moments[:, :1]).float())
    assert not calls.rows


def test_parts_are_called_together_as_soon_as_they_are_loaded(
    folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.philox32, "FAST_PHILOX32", Deferred("draws", load_philox32, worth=2 * 12 * 64))
    batches = make(MappedShards(folder))
    filled = []
    for step in range(3):
        batches.batch(step)
        filled.append(calls.rows)
    assert filled == [0, 12, 24]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_shard_that_is_cut_during_a_run_is_named(tmp_path: Path, calls: Calls, threads: int) -> None:
    encode_pattern(tmp_path, autoencoder=Posterior(1))
    batches = make(MappedShards(tmp_path), threads=threads, batch_size=50)
    batches.batch(0)
    assert calls.rows == 50
    os.truncate(tmp_path / "shard-000003.tar", 4096)
    with pytest.raises(ValueError, match=r"shard-000003.tar was cut while this job ran; run the same"):
        batches.batch(1)
    assert 50 < calls.rows < 100


def test_features_are_read_for_what_one_call_filled(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards"
    encode_with_teacher(folder, small_teacher(tmp_path / "teacher"))
    batches = make(MappedShards(folder), target_steps=2, threads=2)
    found = [batches.batch(step) for step in range(3)]
    assert calls.rows == 36
    monkeypatch.setattr(core.samples, "FAST_SAMPLES", Deferred("batches", lambda: None, worth=0))
    expected = list(map(make(MappedShards(folder), target_steps=2).batch, range(3)))
    assert calls.rows == 36
    assert found[0].targets["features"].shape[2] == DIM
    assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))


def test_files_stay_open_while_they_may_be_read(folder: Path, calls: Calls) -> None:
    shards, rows = MappedShards(folder), np.arange(50)
    places = shards.places(rows, rows % 2 == 0)
    can_share, reads = shards.map_places(places)
    assert can_share
    assert reads is not None
    expected = shards.gather(rows, rows % 2 == 0)
    shards.close()
    out = np.empty_like(expected)
    as_bytes = out.reshape(50, -1).view(np.uint8)
    assert reads.read_rows(reads.descriptors, reads.offsets, as_bytes) == 50
    np.testing.assert_array_equal(out, expected)
