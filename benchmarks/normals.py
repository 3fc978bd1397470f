"""Measure the normals of philox32_v1: exactly over all words, and over a sample of more than 10^9.

``python -m benchmarks.normals`` prints one JSON line: the moments of the distribution that all 2^31 words give, its
largest distance from the normal distribution at each 1,021st word and at all in the tails (the limit of Kolmogorov and
Smirnov's statistic), the facts of a sample in units of their standard deviations, and nanoseconds a normal.
"""

import json
import time
from collections.abc import Iterator
from math import erfc, sqrt
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from benchmarks.commit import current_commit
from benchmarks.loader import processor
from core.compiled_philox32 import _normal, _signed_bits
from core.draws import Purpose
from core.normal_table import FIRST_INDEX, normal_table
from core.philox32 import load_philox32
from core.tensor_philox32 import UNIT

PART = 2**20
SAMPLES, SEED = 2**30, 4
LENGTH = 4096  # of a sample's noise
TAILS = (1, 2, 3, 4, 5, 5.5)


@njit(nogil=True)
def fill_by_words(out, first, table):  # type: ignore[no-untyped-def]
    """Write the normals of the words first + 1, first + 3 and so on, which are all positive."""
    for place in range(out.size):
        bits = _signed_bits(np.uint64(first + 1 + 2 * place))
        out[place] = _normal(bits, table[np.int64(bits >> np.uint32(16)) - FIRST_INDEX])


def every_word() -> dict[str, Any]:
    """Return the facts of the distribution that all words give; it is symmetric, so only positive ones are visited."""
    normals, table = np.empty(PART, np.float32), normal_table()
    sums, distance = np.zeros(4), 0.0
    erfcs = np.vectorize(erfc, otypes=[float])
    for first in range(0, 2**31, 2 * PART):
        fill_by_words(normals, first, table)
        values = normals.astype(np.float64)
        sums += [(values**power).sum() for power in (2, 4, 6, 8)]
        chosen = values[:: 1 if first == 0 else 1021]
        tails = np.arange(first + 2, first + 2 * PART + 2, 2)[:: 1 if first == 0 else 1021] / 2**32
        distance = max(distance, np.abs(erfcs(chosen / sqrt(2)) / 2 - tails).max())
    means = sums / 2**30
    return {
        "relative_errors_of_moments_2_4_6_8": [
            float(mean / of) - 1 for mean, of in zip(means, (1, 3, 15, 105), strict=True)
        ],
        "largest_distance_of_distributions": distance,
    }


def sampled(seed: int, purpose: Purpose) -> Iterator[NDArray[np.float32]]:
    """Yield SAMPLES normals of consecutive positions."""
    function = load_philox32().normals(purpose, seed)
    for first in range(0, SAMPLES // LENGTH, PART // LENGTH):
        positions = np.arange(first, first + PART // LENGTH)
        normals = np.empty((len(positions), LENGTH), np.float32)
        function.write(normals, positions)
        yield normals


def sample() -> dict[str, Any]:
    """Return the facts of a sample, each with its standard deviation or in units of it."""
    counts, sums, tails, products = np.zeros(2**14, np.int64), np.zeros(4), np.zeros(len(TAILS)), np.zeros(5)
    for noise, posterior in zip(sampled(SEED, Purpose.NOISE), sampled(SEED, Purpose.POSTERIOR), strict=True):
        values = noise.astype(np.float64)
        counts += np.bincount(((noise.ravel() / UNIT).astype(np.int64) + 2**24) >> 11, minlength=2**14)
        sums += [(values**power).sum() for power in (1, 2, 3, 4)]
        tails += [(np.abs(values) > bound).sum() for bound in TAILS]
        others = [(values, posterior), (values[1:], values[:-1]), (values[:, 1:], values[:, :-1])]
        others += [(values[:, 16:], values[:, :-16]), (values**2 - 1, posterior.astype(np.float64) ** 2 - 1)]
        products += [float((one * other).sum()) for one, other in others]
    edges = (np.arange(1, 2**14 + 1) * 2**11 - 2**24) * UNIT
    exact = np.array([erfc(-edge / sqrt(2)) / 2 for edge in edges])
    expected = [SAMPLES * erfc(bound / sqrt(2)) for bound in TAILS]
    deviations = [1, 1, 1, 1, 2]
    return {
        "samples": SAMPLES,
        "kolmogorov_smirnov_statistic": float(np.abs(counts.cumsum() / SAMPLES - exact).max()),
        "and_its_critical_value_at_5_percent": 1.358 / sqrt(SAMPLES),
        "moments_1_2_3_4_in_deviations": [
            round(float((total / SAMPLES - mean) * sqrt(SAMPLES / variance)), 2)
            for total, mean, variance in zip(sums, (0, 1, 0, 3), (1, 2, 15, 96), strict=True)
        ],
        "beyond_1_2_3_4_5_5.5_in_deviations": [
            round(float((tail - mean) / sqrt(mean)), 2) for tail, mean in zip(tails, expected, strict=True)
        ],
        "beyond_5.5": [int(tails[-1]), round(expected[-1], 1)],
        "correlations_in_deviations": dict(
            zip(
                ("purposes", "positions", "neighbors", "neighbors_16_apart", "squares_of_purposes"),
                [round(float(total / sqrt(SAMPLES) / by), 2) for total, by in zip(products, deviations, strict=True)],
                strict=True,
            )
        ),
    }


def nanoseconds() -> float:
    """Return the least processor time of a normal."""
    normals, positions, found = np.empty((256, LENGTH), np.float32), np.arange(256), []
    function = load_philox32().normals(Purpose.NOISE, 0)
    for _ in range(50):
        started = time.process_time()
        function.write(normals, positions)
        found.append((time.process_time() - started) / normals.size * 1e9)
    return round(min(found), 2)


def main() -> None:
    result = {"benchmark": "normals", "every_word": every_word(), "sample": sample(), "ns_per_normal": nanoseconds()}
    print(json.dumps(result | {"processor": processor(), "numpy": np.__version__, "commit": current_commit()}))


if __name__ == "__main__":
    main()
