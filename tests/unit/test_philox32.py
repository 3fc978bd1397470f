"""philox32_v1 draws Random123's words and exact normals: the same bits compiled, by PyTorch's operations, and alone."""

import sys
from math import erfc, exp, sqrt
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import core.philox32
from core.deferred import Deferred
from core.draws import Philox, Purpose, Streams, Times, draw_noise, training_draws
from core.normal_table import normal_table
from core.philox32 import CompiledPhilox32, Philox32, load_philox32
from core.tensor_philox32 import UNIT, block_words, normals_of_words, stream_words
from diffusion.times import LogitNormalTimes, LogNormalLevels, MovedTimes, UniformSteps, UniformTimes

LARGEST = 2**63 - 1
# Counter, key and words of philox4x32-10 in the file kat_vectors of Random123.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
PINNED_NOISE = [2510582.0, -2546929.0, -2879346.0]
PINNED_POSTERIOR = [-449570.0, -1241004.0, 3181826.0]
PINNED_REST = (953, False, False)
PINNED_TIME = 15991784.0
PINNED_TABLE = (3969, 8436518849481, 2292637711)


@pytest.fixture(scope="module")
def compiled() -> CompiledPhilox32:
    return load_philox32()


def by_pytorch(positions: list[int], count: int, stream: int, seed: int) -> np.ndarray:
    return normals_of_words(stream_words(torch.tensor(positions), count, stream, seed)).numpy()


def by_numba(compiled: CompiledPhilox32, positions: list[int], count: int, stream: int, seed: int) -> np.ndarray:
    out = np.full((len(positions), count), np.nan, np.float32)
    compiled.normals(stream, seed).write(out, np.array(positions))
    return out


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_words_are_those_that_random123_publishes(counter: list[int], key: list[int], words: list[int]) -> None:
    c0, c1, c2, c3 = (torch.tensor([number]) for number in counter)
    found = block_words((c0, c1, c2, c3), key[0] | key[1] << 32)
    assert [int(word) for word in found] == words


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, LARGEST),
    position=st.integers(0, LARGEST),
    stream=st.integers(0, 2**32 - 1),
    count=st.integers(0, 3000),
)
def test_compiled_draws_are_those_of_pytorchs_operations(
    compiled: CompiledPhilox32, seed: int, position: int, stream: int, count: int
) -> None:
    found = by_numba(compiled, [position], count, stream, seed)
    assert found.tobytes() == by_pytorch([position], count, stream, seed).tobytes()
    words = np.empty(1, np.uint64)
    compiled.fill_first_words(words, np.array([position]), np.uint64(stream), np.uint64(seed))
    expected = stream_words(torch.tensor([position]), 17, stream, seed)[0]
    assert (int(words[0]) & 0xFFFFFFFF, int(words[0]) >> 32) == (int(expected[0]), int(expected[16]))


def test_a_million_compiled_normals_are_those_of_pytorchs_operations(compiled: CompiledPhilox32) -> None:
    positions = list(range(2**40, 2**40 + 256))
    assert by_numba(compiled, positions, 4099, 2, 7).tobytes() == by_pytorch(positions, 4099, 2, 7).tobytes()


def test_draws_are_these_numbers_for_ever() -> None:
    """Compare with pinned values: a run of an earlier version must continue with the same numbers."""
    draws = training_draws(Philox32(0), np.array([5]), (1, 1, 3), UniformSteps(1000), class_dropout=0.1, flip=True)
    assert (draws.noise.ravel() / UNIT).tolist() == PINNED_NOISE
    assert (draws.posterior.ravel() / UNIT).tolist() == PINNED_POSTERIOR
    assert (draws.t[0], draws.dropped[0], draws.flip[0]) == PINNED_REST
    (time,) = Philox32(0).times(np.array([5]), UniformTimes())
    assert time * 2**24 == PINNED_TIME
    table = normal_table()
    assert (len(table), int(table.astype(np.int64).sum()), int(np.bitwise_xor.reduce(table))) == PINNED_TABLE


@pytest.mark.parametrize("worth", [0, 10**9])
def test_a_sample_draws_the_same_whatever_the_batch_the_shape_and_the_compiler(
    monkeypatch: pytest.MonkeyPatch, worth: int
) -> None:
    monkeypatch.setattr(core.philox32, "FAST_PHILOX32", Deferred("draws", load_philox32, worth=worth))
    positions = np.array([3, 2**40, 2**62, 4])
    for times in (UniformSteps(1000), UniformTimes()):
        together = training_draws(Philox32(9), positions, (4, 9, 5), times, 0.5, True)
        assert (core.philox32.FAST_PHILOX32.get(0) is not None) == (worth == 0)
        for index, position in enumerate(positions):
            alone = training_draws(Philox32(9), np.array([position]), (4, 9, 5), times, 0.5, True)
            for one, two in zip(together, alone, strict=True):
                assert (one.dtype, one[index].tobytes()) == (two.dtype, two[0].tobytes())
    short = draw_noise(Philox32(9), positions, 0, (1, 1, 70), Purpose.NOISE).reshape(4, 70)
    np.testing.assert_array_equal(short, together.noise.reshape(4, -1)[:, :70])
    assert draw_noise(Philox32(9), np.arange(0), 0, (4, 2, 2), Purpose.NOISE).shape == (0, 4, 2, 2)


def test_normals_are_the_inverse_distribution_of_their_words() -> None:
    """Compare words from the whole range, and the 2^15 of each tail's end, with the inverse in float64."""
    halves = np.concatenate([np.arange(1, 2**31, 2001 * 64) | 1, np.arange(1, 2**16, 2), [2**31 - 1]])
    found = normals_of_words(torch.from_numpy(halves)).numpy().astype(np.float64)
    mirrored = normals_of_words(torch.from_numpy(halves + 2**31)).numpy()
    np.testing.assert_array_equal(mirrored, -found)
    assert found.min() == 0  # the highest bit is the sign
    exact = np.array([NormalDist().inv_cdf(half / 2**32) for half in halves.tolist()])
    assert np.abs(-found - exact).max() < 1.2e-5
    tails = np.array([0.5 * erfc(normal / sqrt(2)) for normal in found.tolist()])
    assert np.abs(tails * 2**32 / halves - 1).max() < 3e-5
    assert np.abs(tails - halves / 2**32).max() < 4e-6
    assert 6.2 < found.max() < 6.3


def test_the_table_falls_from_interval_to_interval() -> None:
    table = normal_table().astype(np.int64)
    values, drops = table >> 11, table & 0x7FF
    np.testing.assert_array_equal(np.diff(values), -drops[:-1])
    assert (drops[:-1] > 0).all()
    assert values[-1] == 0


def test_normals_have_the_moments_and_tails_that_they_should(compiled: CompiledPhilox32) -> None:
    """Draw 2^24 normals; every bound is five standard deviations."""
    normals = by_numba(compiled, list(range(4096)), 4096, 2, 3).astype(np.float64).ravel()
    count = len(normals)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((normals**power).mean() - mean) < 5 * sqrt(variance / count)
    for bound in (1, 2, 3, 4, 4.5):
        expected = count * erfc(bound / sqrt(2))
        assert abs((np.abs(normals) > bound).sum() - expected) < 5 * sqrt(expected)


@pytest.mark.parametrize("lag", [1, 16, 64, 1024])
def test_places_positions_purposes_draws_and_seeds_are_not_correlated(lag: int) -> None:
    positions, shape = np.arange(64), (4, 32, 32)
    streams = [
        draw_noise(Philox32(seed), positions + shift, draw, shape, purpose).reshape(64, -1)
        for seed, shift, draw, purpose in (
            (1, 0, 0, Purpose.NOISE),
            (1, 0, 0, Purpose.POSTERIOR),
            (1, 0, 1, Purpose.NOISE),
            (2, 0, 0, Purpose.NOISE),
            (1 + 2**32, 0, 0, Purpose.NOISE),
            (1, 2**32, 0, Purpose.NOISE),
        )
    ]
    first = streams[0]
    pairs = [(first, other) for other in streams[1:]] + [(first[:-1], first[1:]), (first[:, :-lag], first[:, lag:])]
    for one, other in pairs:
        for left, right in ((one, other), (one**2, other**2), (np.abs(one), other)):
            assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 5 / sqrt(one.size)


def test_draws_of_training_have_the_distributions_that_they_should() -> None:
    draws = training_draws(Philox32(1), np.arange(20000), (1, 2, 2), UniformSteps(10), 0.1, True)
    counts = np.bincount(draws.t, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 30  # chi-squared with 9 degrees of freedom
    assert abs(draws.dropped.mean() - 0.1) < 0.011
    assert abs(draws.flip.mean() - 0.5) < 0.018
    assert abs(np.corrcoef(draws.noise.ravel(), draws.posterior.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(draws.flip, draws.dropped)[0, 1]) < 0.04


@settings(max_examples=200, deadline=None)
@given(word=st.integers(0, 2**64 - 1), num_steps=st.integers(1, 2**32 - 1))
def test_times_of_bits_are_the_highest_ones(word: int, num_steps: int) -> None:
    words = np.array([word], np.uint64)
    assert UniformSteps(num_steps).of_bits(words).tolist() == [word * num_steps >> 64]
    (time,) = UniformTimes().of_bits(words).tolist()
    assert (time, time < 1) == ((word >> 40) / 2**24, True)


@pytest.mark.parametrize(
    ("times", "median"),
    [
        (LogitNormalTimes(), 0.5),
        (LogNormalLevels(), exp(-1.2)),
        (MovedTimes(UniformTimes(), 3.0, 0.1, 0.9), 0.7),
        (MovedTimes(LogitNormalTimes(), 3.0, 0.0, 1.0), 0.75),
    ],
)
def test_times_of_other_distributions_come_from_the_same_bits(times: Times, median: float) -> None:
    positions = np.arange(4000)
    found = Philox32(1).times(positions, times)
    assert found.dtype == times.dtype
    assert abs((found < median).mean() - 0.5) < 0.04
    assert Philox32(1).times(positions[7:8], times).tolist() == found[7:8].tolist()


@pytest.mark.parametrize("kind", [Philox, Philox32])
def test_a_seed_that_is_no_key_is_refused(kind: type[Streams]) -> None:
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed is {seed}, but it must be between 0 and {LARGEST}; choose"):
            kind(seed)  # type: ignore[call-arg]


def test_without_numba_pytorch_draws_the_same_and_one_note_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiled: CompiledPhilox32
) -> None:
    expected = by_numba(compiled, [41], 6, Purpose.NOISE + 256 * 2, 7)
    monkeypatch.delitem(sys.modules, "core.compiled_philox32", raising=False)
    monkeypatch.delitem(sys.modules, "core.numba_functions", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(core.philox32, "FAST_PHILOX32", Deferred("draws", load_philox32, worth=0))
    for _ in range(2):
        found = draw_noise(Philox32(7), np.array([41]), 2, (1, 2, 3), Purpose.NOISE)
        assert found.tobytes() == expected.tobytes()
    shown = capsys.readouterr().out
    assert shown.startswith("note: draws are not compiled, and several times slower: ")
    assert shown.count("\n") == 1


def test_compiled_draws_that_differ_are_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiled: CompiledPhilox32
) -> None:
    wrong_compiled = compiled._replace(fill_first_words=lambda words, *_: words.fill(0))
    assert not core.philox32._equal_pytorchs(wrong_compiled)
    monkeypatch.setattr("core.philox32._equal_pytorchs", lambda _: False)
    assert Deferred("draws", load_philox32, worth=0).get(1) is None
    assert "slower: they differ from PyTorch's on this machine." in capsys.readouterr().out
