"""Compute a table of the normal's inverse distribution, for integer arithmetic that gives the same bits everywhere.

A tail probability v / 2^32, with an odd v below 2^31, is converted to float32. The float's exponent and the seven bits
after it are the index of an entry, its 16 lowest bits the place in the entry's interval, where the inverse is linear.
An entry has the inverse at the interval's start, in its 21 highest bits, and how much it falls to the interval's end.
Both count 2^-18.
"""

import math
from functools import cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

FIRST_INDEX = 127 << 7  # of the float 1
DROP_BITS = 11
_OCTAVES, _PER_OCTAVE = 31, 128
_UNIT = 2.0**-18


@cache
def normal_table() -> NDArray[np.uint32]:
    """Return the table [3969], computed in float64; no rounding is closer to a tie than 10,000 times its error."""
    values = [round(_fitted(*divmod(index, _PER_OCTAVE)) / _UNIT) for index in range(_OCTAVES * _PER_OCTAVE)]
    pairs = [*pairwise([*values, 0]), (0, 0)]  # the last entry is of the probability 1/2 alone
    return np.array([value << DROP_BITS | value - following for value, following in pairs], dtype=np.uint32)


def _fitted(octave: int, step: int) -> float:
    """Return the end of linear pieces that are on average as large as the inverse, which is convex."""
    start = 2.0 ** (octave - 32)
    inverse = -NormalDist().inv_cdf(start * (1 + step / _PER_OCTAVE))
    density = math.exp(-0.5 * inverse * inverse) / math.sqrt(2 * math.pi)
    width = start / _PER_OCTAVE
    squared_width = width**2 * (1 if step else 5 / 8)  # the mean of both intervals': the one before is half as wide
    return inverse - squared_width * inverse / density**2 / 12
