"""Order and draws are pure functions of (seed, position)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.draws import Philox, Purpose, draw_noise, permutation, training_draws
from data.order import GlobalOrder, Order, WindowedOrder, positions_of_step
from diffusion.times import UniformSteps

PINNED_NOISE = [1.8699285984039307, 0.6554148197174072, 0.6459668278694153]
PINNED_REST = (446, False, True)  # t, dropped, flip
PINNED_ORDER = [5, 0, 7, 2, 4, 6, 3, 1]
PINNED_POSTERIOR = [-0.7672624588012695, 0.04104878753423691, 0.7439126968383789]
PINNED_WINDOWED_ORDER = [5, 2, 6, 1, 7, 0, 3, 4]


# Samples of each shard; of an empty one, no image could be read.
COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any)
WINDOW = st.one_of(st.none(), st.integers(1, 10))  # shards of a window; none: the global order


def make_order(seed: int, counts: list[int], window: int | None) -> Order:
    return GlobalOrder(seed, counts) if window is None else WindowedOrder(seed, counts, window)


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000), counts=COUNTS, window=WINDOW)
@settings(max_examples=60, deadline=None)
def test_every_sample_is_seen_once_an_epoch(seed: int, epoch: int, counts: list[int], window: int | None) -> None:
    length = sum(counts)
    positions = np.arange(epoch * length, (epoch + 1) * length)
    assert sorted(make_order(seed, counts, window).rows_at(positions)) == list(range(length))


@given(share=st.integers(1, 8), world=st.integers(1, 8), step=st.integers(0, 10_000), counts=COUNTS, window=WINDOW)
@settings(max_examples=60, deadline=None)
def test_order_does_not_depend_on_the_number_of_processes(
    share: int, world: int, step: int, counts: list[int], window: int | None
) -> None:
    """Use batches that may be larger than a window or an epoch; a process needs only its own order."""
    batch_size = share * world
    whole = make_order(0, counts, window).rows_at(positions_of_step(step, batch_size, 0, 1))
    slices = [positions_of_step(step, batch_size, rank, world) for rank in range(world)]
    parts = [make_order(0, counts, window).rows_at(positions) for positions in slices]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(counts=COUNTS, window=WINDOW, first=st.integers(0, 5000))
@settings(max_examples=60, deadline=None)
def test_the_positions_of_a_window_touch_its_shards_and_no_others(
    counts: list[int], window: int | None, first: int
) -> None:
    order = make_order(3, counts, window)
    shard_of_row = np.repeat(np.arange(len(counts)), counts)
    found = order.window(first)
    assert found.first <= first < found.last
    rows = order.rows_at(np.arange(found.first, found.last))
    assert set(shard_of_row[rows]) == set(found.shards)
    assert len(rows) == sum(counts[shard] for shard in found.shards) >= order.smallest_window
    assert len(found.shards) <= order.shards_per_window
    following = order.window(found.last)
    assert following.first == found.last
    length = sum(counts)
    assert following.first // length > found.first // length or not set(following.shards) & set(found.shards)


@pytest.mark.parametrize("window", [None, 3])
def test_epochs_and_seeds_have_different_orders(window: int | None) -> None:
    orders = [
        make_order(seed, [100] * 10, window).rows_at(np.arange(1000) + 1000 * epoch).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_windows_mix_their_shards_and_differ_from_epoch_to_epoch() -> None:
    order = WindowedOrder(0, [100] * 12, 4)
    epochs = [[set(order.window(1200 * epoch + 400 * number).shards) for number in range(3)] for epoch in range(4)]
    assert len({frozenset(map(frozenset, windows)) for windows in epochs}) == 4
    for first in range(0, 4800, 400):  # any stretch of a window has samples of all of its shards
        shards = order.rows_at(np.arange(first, first + 100)) // 100
        assert len(set(shards)) == 4


def test_a_window_of_no_shards_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.order.shards_per_window is 0, but a window has at least 1 shard"):
        WindowedOrder(0, [5, 5], 0)


def test_a_batch_that_does_not_divide_by_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 10 is not a multiple of 4 processes; use 8 or 12"):
        positions_of_step(0, 10, 0, 4)


def test_a_stream_equals_a_fresh_philox_of_that_counter() -> None:
    reused = Philox(7)
    reused.at(3, Purpose.TIMESTEP).random(5)  # leaves half-used words behind
    counter = np.array([0, 41, Purpose.NOISE, 2], dtype=np.uint64)
    fresh = np.random.Generator(np.random.Philox(key=np.array([7, 0], dtype=np.uint64), counter=counter))
    np.testing.assert_array_equal(reused.at(41, Purpose.NOISE, 2).random(9), fresh.random(9))


def test_draws_are_these_numbers_for_ever() -> None:
    """Compare with pinned values: a run of an earlier version must continue with the same numbers."""
    draws = training_draws(Philox(0), np.array([5]), (1, 1, 3), UniformSteps(1000), class_dropout=0.1, flip=True)
    again = training_draws(Philox(0), np.array([4, 5]), (1, 1, 3), UniformSteps(1000), class_dropout=0.1, flip=True)
    for one, two in zip(draws, again, strict=True):
        np.testing.assert_array_equal(one[0], two[1])
    assert draws.noise.ravel().tolist() == pytest.approx(PINNED_NOISE, rel=1e-6)
    assert draws.posterior.ravel().tolist() == pytest.approx(PINNED_POSTERIOR, rel=1e-6)
    assert (draws.t[0], draws.dropped[0], draws.flip[0]) == PINNED_REST
    assert permutation(Philox(0), 0, Purpose.ORDER, 8).tolist() == PINNED_ORDER
    assert GlobalOrder(0, [3, 5]).rows_at(np.arange(8)).tolist() == PINNED_ORDER
    assert WindowedOrder(0, [3, 2, 3], 2).rows_at(np.arange(8)).tolist() == PINNED_WINDOWED_ORDER


def test_draws_of_one_purpose_do_not_shift_another() -> None:
    small = training_draws(Philox(0), np.arange(9), (1, 2, 2), UniformSteps(1000), 0.1, True)
    large = training_draws(Philox(0), np.arange(9), (4, 8, 8), UniformSteps(1000), 0.1, True)
    for one, two in zip(small[2:], large[2:], strict=True):
        np.testing.assert_array_equal(one, two)


def test_draws_have_the_distributions_that_they_should() -> None:
    draws = training_draws(Philox(1), np.arange(4000), (1, 2, 2), UniformSteps(1000), 0.1, True)
    assert abs(draws.noise.mean()) < 0.03
    assert abs(draws.noise.std() - 1) < 0.03
    assert abs(np.corrcoef(draws.noise.reshape(4000, -1).T) - np.eye(4)).max() < 0.06
    assert abs(draws.t.mean() - 499.5) < 15
    assert abs(draws.dropped.mean() - 0.1) < 0.015
    assert abs(draws.flip.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(draws.noise.ravel(), draws.posterior.ravel())[0, 1]) < 0.03


def test_no_flip_where_the_data_forbids_it() -> None:
    assert not training_draws(Philox(0), np.arange(50), (1, 1, 1), UniformSteps(1000), 0.1, False).flip.any()


def test_sampling_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    philox = Philox(3)
    together = draw_noise(philox, np.array([4, 5, 6]), 2, (1, 4, 4), Purpose.SAMPLING)
    alone = draw_noise(philox, np.array([5]), 2, (1, 4, 4), Purpose.SAMPLING)
    np.testing.assert_array_equal(together[1], alone[0])
    assert not np.array_equal(together[0], together[1])


def test_a_seed_that_is_no_key_is_refused() -> None:
    with pytest.raises(ValueError, match="seed is -1"):
        Philox(-1)
