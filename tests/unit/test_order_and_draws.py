"""Order and draws are pure functions of (seed, position)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import epoch_order, positions_of_step, rows_at
from diffusion.draws import Philox, Purpose, draw_noise, permutation, training_draws

PINNED_NOISE = [1.8699285984039307, 0.6554148197174072, 0.6459668278694153]
PINNED_REST = (446, False, True)  # t, drop_label, flip
PINNED_ORDER = [5, 0, 7, 2, 4, 6, 3, 1]


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000), length=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_every_sample_is_seen_once_an_epoch(seed: int, epoch: int, length: int) -> None:
    positions = np.arange(epoch * length, (epoch + 1) * length)
    assert sorted(rows_at(seed, positions, length)) == list(range(length))


@given(share=st.integers(1, 8), world=st.integers(1, 8), step=st.integers(0, 10_000), length=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_order_does_not_depend_on_the_number_of_processes(share: int, world: int, step: int, length: int) -> None:
    batch_size = share * world
    whole = rows_at(0, positions_of_step(step, batch_size, 0, 1), length)
    parts = [rows_at(0, positions_of_step(step, batch_size, rank, world), length) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [epoch_order(seed, epoch, 1000).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_that_does_not_divide_by_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 10 does not divide by the 4 processes; use 8 or 12"):
        positions_of_step(0, 10, 0, 4)


def test_a_stream_equals_a_fresh_philox_of_that_counter() -> None:
    reused = Philox(7)
    reused.at(3, Purpose.TIMESTEP).random(5)  # leaves half-used words behind
    counter = np.array([0, 41, Purpose.NOISE, 2], dtype=np.uint64)
    fresh = np.random.Generator(np.random.Philox(key=np.array([7, 0], dtype=np.uint64), counter=counter))
    np.testing.assert_array_equal(reused.at(41, Purpose.NOISE, 2).random(9), fresh.random(9))


def test_draws_are_these_numbers_for_ever() -> None:
    """Pinned bits: a run of an earlier version must continue with the same numbers."""
    draws = training_draws(Philox(0), 5, (1, 1, 3), 1000, class_dropout=0.1, flip=True)
    again = training_draws(Philox(0), 5, (1, 1, 3), 1000, class_dropout=0.1, flip=True)
    np.testing.assert_array_equal(draws.noise, again.noise)
    assert draws.noise.ravel().tolist() == pytest.approx(PINNED_NOISE, rel=1e-6)
    assert (draws.t, draws.drop_label, draws.flip) == PINNED_REST
    assert permutation(Philox(0), 0, Purpose.ORDER, 8).tolist() == PINNED_ORDER


def test_draws_of_one_purpose_do_not_shift_another() -> None:
    small = training_draws(Philox(0), 9, (1, 2, 2), 1000, 0.1, True)
    large = training_draws(Philox(0), 9, (4, 8, 8), 1000, 0.1, True)
    assert (small.t, small.drop_label, small.flip) == (large.t, large.drop_label, large.flip)


def test_draws_have_the_distributions_that_they_should() -> None:
    philox = Philox(1)
    draws = [training_draws(philox, position, (1, 2, 2), 1000, 0.1, True) for position in range(4000)]
    noise = np.stack([draw.noise for draw in draws])
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert abs(np.corrcoef(noise.reshape(4000, -1).T) - np.eye(4)).max() < 0.06
    assert abs(np.mean([draw.t for draw in draws]) - 499.5) < 15
    assert abs(np.mean([draw.drop_label for draw in draws]) - 0.1) < 0.015
    assert abs(np.mean([draw.flip for draw in draws]) - 0.5) < 0.03
    posterior = np.stack([draw.posterior for draw in draws])
    assert abs(np.corrcoef(noise.ravel(), posterior.ravel())[0, 1]) < 0.03


def test_no_flip_where_the_data_forbids_it() -> None:
    assert not any(training_draws(Philox(0), p, (1, 1, 1), 1000, 0.1, False).flip for p in range(50))


def test_sampling_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    philox = Philox(3)
    together = draw_noise(philox, np.array([4, 5, 6]), 2, (1, 4, 4), Purpose.SAMPLING)
    alone = draw_noise(philox, np.array([5]), 2, (1, 4, 4), Purpose.SAMPLING)
    np.testing.assert_array_equal(together[1], alone[0])
    assert not np.array_equal(together[0], together[1])


def test_a_seed_that_is_no_key_is_refused() -> None:
    with pytest.raises(ValueError, match="seed is -1"):
        Philox(-1)
