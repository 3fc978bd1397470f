"""Summarize the metrics of each step in one line for an interval of steps."""

import math
from collections.abc import Mapping, Sequence

SUM, COUNT = "/sum", "/count"  # endings of two metrics whose quotient is one mean
TOTAL = "/total"  # ending of a metric that is summed over the interval


def summary(interval: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Return means over the steps of an interval, sums for ``/total``, and sum of ``/sum`` / sum of ``/count``.

    A mean over no samples is None.
    """
    line: dict[str, float | None] = {}
    for name, values in interval.items():
        if name.endswith(SUM):
            mean_of = name.removesuffix(SUM)
            count = math.fsum(interval[mean_of + COUNT])
            line[mean_of] = math.fsum(values) / count if count else None
        elif name.endswith(TOTAL):
            line[name.removesuffix(TOTAL)] = math.fsum(values)
        elif not name.endswith(COUNT):
            line[name] = math.fsum(values) / len(values)
    return line
