"""Times have the densities of their formulas, and each depends on its sample's position alone."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from core.draws import Philox, Purpose, Times, TimesOfWords, draw_choices
from diffusion.flow import Flow
from diffusion.paths import GVPPath, VPPath
from diffusion.predictions import PredictNoise
from diffusion.times import LogitNormalTimes, LogNormalLevels, MovedTimes, UniformTimes
from diffusion.weightings import OfVelocity

Values = NDArray[np.float64]


def logit(t: Values) -> Values:
    return np.log(t / (1 - t))


def unshifted(t: Values, shift: float) -> Values:
    return t / (shift - (shift - 1) * t)


CASES: list[tuple[Times, Callable[[Values], Values]]] = [
    (UniformTimes(), lambda t: t),
    (LogitNormalTimes(), lambda t: stats.norm.cdf(logit(t))),
    (LogitNormalTimes(-0.5, 0.8), lambda t: stats.norm.cdf((logit(t) + 0.5) / 0.8)),
    (LogNormalLevels(), lambda t: stats.norm.cdf((np.log(t) + 1.2) / 1.2)),
    (LogNormalLevels(-0.4, 1.0), lambda t: stats.norm.cdf(np.log(t) + 0.4)),
    (MovedTimes(UniformTimes(), 6.93, 0.0, 1.0), lambda t: unshifted(t, 6.93)),
    (MovedTimes(LogitNormalTimes(), 3.0, 0.0, 1.0), lambda t: stats.norm.cdf(logit(unshifted(t, 3.0)))),
    (MovedTimes(UniformTimes(), 1.0, 1e-3, 1 - 1e-3), lambda t: (t - 1e-3) / 0.998),
]
EACH = pytest.mark.parametrize("times", [times for times, _ in CASES])


def drawn(times: Times, positions: range, seed: int = 3) -> NDArray[np.generic]:
    return draw_choices(Philox(seed), np.array(positions), times, 0.1, False).t


@pytest.mark.parametrize(("times", "distribution"), CASES)
def test_times_have_the_density_of_their_formula(times: Times, distribution: Callable[[Values], Values]) -> None:
    found = drawn(times, range(20_000)).astype(np.float64)
    assert stats.kstest(found, distribution).pvalue > 0.01
    wrong = stats.kstest(found, lambda t: distribution(t) ** 1.1)
    assert wrong.pvalue < 1e-6  # so that agreement means something


@EACH
def test_a_time_depends_on_the_seed_and_the_position_alone(times: Times) -> None:
    whole = drawn(times, range(100))
    assert whole.dtype == np.float32
    for size in (1, 7, 50):
        parts = [drawn(times, range(first, min(first + size, 100))) for first in range(0, 100, size)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()
    one_by_one = [times.draw(Philox(3).at(position, Purpose.TIMESTEP)) for position in range(100)]
    assert np.array(one_by_one, dtype=np.float32).tobytes() == whole.tobytes()
    assert drawn(times, range(100), seed=4).tobytes() != whole.tobytes()


def test_a_few_times_are_fixed_since_they_are_part_of_a_run() -> None:
    """Compare with numbers computed once on one machine."""
    assert drawn(LogitNormalTimes(), range(3)).tolist() == [
        0.39020469784736633,
        0.5200152397155762,
        0.49654340744018555,
    ]
    assert drawn(LogNormalLevels(), range(3)).tolist() == [0.1762693226337433, 0.33158352971076965, 0.2962380349636078]


@pytest.mark.parametrize("times", [LogitNormalTimes(scale=30.0), LogNormalLevels(scale=30.0)])
def test_the_extreme_random_bits_give_finite_times(times: TimesOfWords) -> None:
    words = np.array([0, 2**12 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    found, undecided = times.of_words(words)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert (np.diff(found.astype(np.float64)) >= 0).all()
    assert found[0] == found[1]  # numbers of 52 bits
    assert not undecided.any()


def test_the_middle_of_the_random_bits_is_the_median() -> None:
    words = np.array([2**63], dtype=np.uint64)
    assert LogitNormalTimes().of_words(words)[0][0] == pytest.approx(0.5, abs=1e-7)
    assert LogNormalLevels().of_words(words)[0][0] == pytest.approx(math.exp(-1.2))


def test_a_flow_draws_times_in_the_interval_of_its_path_and_prediction() -> None:
    assert isinstance(Flow().times, UniformTimes)
    for flow, interval in (
        (Flow(GVPPath()), (0, 1)),
        (Flow(GVPPath(), PredictNoise()), (1e-3, 1 - 1e-3)),
        (Flow(VPPath()), (1e-5, 1)),
        (Flow(VPPath(), PredictNoise()), (1e-5, 1)),
        (Flow(weighting=OfVelocity()), (1e-3, 1 - 1e-3)),
    ):
        assert flow.training_interval == interval
        found = drawn(flow.times, range(2000))
        assert interval[0] <= found.min() <= interval[0] + 1e-3
        assert interval[1] - 2e-3 <= found.max() <= interval[1]
    assert Flow(VPPath()).sampling_interval == (1e-3, 1)


def test_a_shift_prefers_noise_and_keeps_both_ends() -> None:
    moved = MovedTimes(UniformTimes(), 3.0, 0.0, 1.0)
    words = np.array([0, 2**31], dtype=np.uint64)  # t = 0 and 1/2
    assert moved.of_words(words)[0].tolist() == [0, 0.75]
