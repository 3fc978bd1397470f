"""Draw the curves of figures 2 and 8: one for each family of networks, with a color and a fit of its own."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from report.fit import CONFIDENCE, PowerLaw
from report.models import Kind, model_name
from report.records import DISTANCE, Record
from report.seeds import Seeds, by_model
from report.study import Study
from report.style import FAMILY_COLORS, literal, log_x, marker


class NoDataError(Exception):
    """The runs do not have the data for a figure; the message says why and what to do."""


@dataclass(frozen=True)
class Curve:
    """The models of one family that a scaling figure shows."""

    kind: Kind
    models: list[Seeds]  # by rising Gflops
    fit: PowerLaw | None
    color: str
    objective: str | None  # where it is not that of the other curves

    @property
    def name(self) -> str:
        """Return the family's name, with its objective where that differs."""
        return self.kind.family if self.objective is None else f"{self.kind.family} ({self.objective})"

    @property
    def label(self) -> str:
        """Return the words of the legend: the name, and the slope or the number of models."""
        if self.fit is None:
            runs = sum(len(model.records) for model in self.models)
            return f"{self.name}: {runs} run{'s' * (runs > 1)}"
        return f"{self.name}: slope {self.fit.slope:.2f}, {self.fit.count} models"


def curves_of(study: Study) -> list[Curve]:
    """Return the curve of each family, the main one first. The paper's DiT has the same color in each study."""
    kinds = study.kinds()
    others = [kind.family for kind in kinds if kind.family != "DiT"]
    colors = {"DiT": FAMILY_COLORS[0]}
    colors |= {name: FAMILY_COLORS[1 + i % (len(FAMILY_COLORS) - 1)] for i, name in enumerate(sorted(others))}
    return [
        Curve(
            kind,
            by_model(study.scaling(kind).values()),
            study.fit(kind=kind),
            colors[kind.family],
            None if study.objective_of(kind) == study.main_objective else study.objective_of(kind),
        )
        for kind in kinds
    ]


def scaling_of(study: Study, at_least: int) -> list[Seeds]:
    """Return the models of the main curve. Raises NoDataError where there are fewer than ``at_least`` runs."""
    records = list(study.scaling().values())
    if len(records) < at_least:
        raise NoDataError(f"there are {len(records)} models of one kind, but a curve needs {at_least}; train more.")
    return by_model(records)


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw the models of each family and, where it has one, its fit with the band, over Gflops."""
    for curve in curves:
        x = [model.record["gmacs"] for model in curve.models]
        if curve.fit:
            line = np.geomspace(min(x) / 1.3, max(x) * 1.3, 100)
            axes.fill_between(line, *curve.fit.band(line), color=curve.color, alpha=0.13, linewidth=0)
            axes.plot(line, curve.fit.at(line), "--", color=curve.color, linewidth=1.2)
        draw_models(axes, curve.models, DISTANCE, [curve.color] * len(curve.models))
        annotate_names(axes, curve.models)
    axes.margins(x=0.1, y=0.12)
    log_x(axes)
    title = f"dashed: fits, with {CONFIDENCE:.0%} bands" if any(curve.fit for curve in curves) else None
    legend_of_curves(axes, curves, title)


def draw_models(axes: Axes, models: Sequence[Seeds], key: str, colors: Sequence[str]) -> None:
    """Draw the mean of each model over Gflops, with the range of its seeds."""
    for model, color in zip(models, colors, strict=True):
        record = model.record
        draw_range(axes, [record["gmacs"]], [model], key, color)
        axes.plot(
            record["gmacs"],
            model.mean(key),
            marker(record),
            color=color,
            markersize=7.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )


def draw_line(
    axes: Axes,
    line: Sequence[Seeds],
    over: Callable[[Record], float],
    style: str,
    color: str,
    key: str = DISTANCE,
    label: str | None = None,
    alpha: float = 1,
) -> None:
    """Draw one model's curve: the means of its seeds, and their ranges."""
    x = [over(point.record) for point in line]
    draw_range(axes, x, line, key, color)
    axes.plot(x, [point.mean(key) for point in line], style, color=color, label=label, alpha=alpha)


def draw_range(axes: Axes, x: Sequence[float], points: Sequence[Seeds], key: str, color: str) -> None:
    """Draw a bar from the least to the greatest number of each point that has several seeds."""
    several = [(at, point.values(key)) for at, point in zip(x, points, strict=True) if len(point.records) > 1]
    if several:
        lows, highs = ([end(values) for _, values in several] for end in (min, max))
        axes.vlines([at for at, _ in several], lows, highs, color=color, linewidth=1.1)


def annotate_names(axes: Axes, models: Sequence[Seeds], key: str = DISTANCE) -> None:
    """Write each model's name beside its point over Gflops: above it, or below where two names would meet."""
    rising = sorted(models, key=lambda model: model.record["gmacs"])
    places = [(model.record["gmacs"], model.mean(key)) for model in rising]
    close = [_is_close(*pair) for pair in itertools.pairwise(places)]
    is_below = False
    for i, (model, place) in enumerate(zip(rising, places, strict=True)):
        before, after = i > 0 and close[i - 1], i < len(close) and close[i]
        is_below = not is_below if before else after
        side: dict[str, Any] = {"xytext": (-7, -4), "ha": "right", "va": "top"} if is_below else {"xytext": (7, 4)}
        name = literal(model_name(model.record))
        axes.annotate(name, place, textcoords="offset points", fontsize=7.5, **side)


def _is_close(one: tuple[float, float], next_: tuple[float, float]) -> bool:
    """Return whether the names of two points would meet, above on the right of both."""
    low, high = sorted((one[1], next_[1]))
    return next_[0] < 1.6 * one[0] and high < 1.07 * low


def legend_of_curves(axes: Axes, curves: Sequence[Curve], title: str | None = None) -> None:
    """Add a legend with an entry for each family, and for each labeled artist of the axes."""
    handles = [
        Line2D([], [], color=c.color, marker="o", linestyle="--" if c.fit else "none", label=literal(c.label))
        for c in curves
    ]
    axes.legend(handles=[*handles, *axes.get_legend_handles_labels()[0]], title=title, title_fontsize=8, loc="best")
