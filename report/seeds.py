"""Group the runs of one model, its seeds: figures show their mean, with a bar from the least to the greatest."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from report.models import kind_of, model_name
from report.records import DISTANCE, Record


@dataclass(frozen=True)
class Seeds:
    """The records of one model at one moment, one for each of its training seeds."""

    records: tuple[Record, ...]

    @property
    def record(self) -> Record:
        """Return one of the records, for the facts that all share."""
        return self.records[0]

    def values(self, key: str = DISTANCE) -> list[float]:
        """Return the number of each seed."""
        return [float(record[key]) for record in self.records]

    def mean(self, key: str = DISTANCE) -> float:
        """Return the mean over the seeds: of distances above 0 the geometric one, as their axis is logarithmic."""
        values = self.values(key)
        if len(values) == 1:
            return values[0]
        return geometric_mean(values) if key == DISTANCE and min(values) > 0 else float(np.mean(values))


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of numbers above 0."""
    return float(np.exp(np.log(values).mean()))


def by_model(records: Iterable[Record]) -> list[Seeds]:
    """Return the records of each model, in the order of their first ones."""
    found: defaultdict[tuple[object, ...], list[Record]] = defaultdict(list)
    for record in records:
        found[kind_of(record), model_name(record), record["gmacs"]].append(record)
    return [Seeds(tuple(of_model)) for of_model in found.values()]


def curves_by_model(curves: Iterable[Sequence[Record]], over: Callable[[Record], float]) -> list[list[Seeds]]:
    """Return the curve of each model, from those of its runs: its seeds at each value of ``over``, by rising value."""
    points = by_model(record for curve in curves for record in curve)
    return [_sorted_by(model, over) for model in points]


def _sorted_by(model: Seeds, over: Callable[[Record], float]) -> list[Seeds]:
    found: defaultdict[float, list[Record]] = defaultdict(list)
    for record in model.records:
        found[over(record)].append(record)
    return [Seeds(tuple(found[value])) for value in sorted(found)]
