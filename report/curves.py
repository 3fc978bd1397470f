"""Draw the curves of figures 2 and 8: one for each family of networks, with a color and a fit of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from report.fit import CONFIDENCE, PowerLaw
from report.models import Kind, model_name
from report.study import Record, Study
from report.style import FAMILY_COLORS, literal, log_x, marker

DISTANCE = "frechet_distance"


class NoDataError(Exception):
    """The runs do not have the data for a figure; the message says why and what to do."""


@dataclass(frozen=True)
class Curve:
    """The models of one family that a scaling figure shows."""

    kind: Kind
    records: list[Record]  # by rising Gflops
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
            return f"{self.name}: {len(self.records)} run{'s' * (len(self.records) > 1)}"
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
            list(study.scaling(kind).values()),
            study.fit(kind=kind),
            colors[kind.family],
            None if study.objective_of(kind) == study.main_objective else study.objective_of(kind),
        )
        for kind in kinds
    ]


def scaling_of(study: Study, at_least: int) -> list[Record]:
    """Return the records of the main curve. Raises NoDataError where there are fewer than ``at_least``."""
    records = list(study.scaling().values())
    if len(records) < at_least:
        raise NoDataError(f"there are {len(records)} models of one kind, but a curve needs {at_least}; train more.")
    return records


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw the models of each family and, where it has one, its fit with the band, over Gflops."""
    for curve in curves:
        x = [record["gmacs"] for record in curve.records]
        if curve.fit:
            line = np.geomspace(min(x) / 1.3, max(x) * 1.3, 100)
            axes.fill_between(line, *curve.fit.band(line), color=curve.color, alpha=0.13, linewidth=0)
            axes.plot(line, curve.fit.at(line), "--", color=curve.color, linewidth=1.2)
        for record in curve.records:
            place = (record["gmacs"], record[DISTANCE])
            axes.plot(
                *place,
                marker(record),
                color=curve.color,
                markersize=7.5,
                markeredgecolor="white",
                markeredgewidth=0.8,
            )
        annotate_names(axes, curve.records)
    axes.margins(x=0.1, y=0.12)
    log_x(axes)
    title = f"dashed: fits, with {CONFIDENCE:.0%} bands" if any(curve.fit for curve in curves) else None
    legend_of_curves(axes, curves, title)


def annotate_names(axes: Axes, records: Sequence[Record], key: str = DISTANCE) -> None:
    """Write each model's name beside its point over Gflops, beside the highest one where it has several seeds."""
    highest = {(model_name(record), record["gmacs"]): record for record in sorted(records, key=lambda r: r[key])}
    for (name, gmacs), record in highest.items():
        axes.annotate(literal(name), (gmacs, record[key]), (7, 4), textcoords="offset points", fontsize=7.5)


def legend_of_curves(axes: Axes, curves: Sequence[Curve], title: str | None = None) -> None:
    """Add a legend with an entry for each family, and for each labeled artist of the axes."""
    handles = [
        Line2D([], [], color=c.color, marker="o", linestyle="--" if c.fit else "none", label=literal(c.label))
        for c in curves
    ]
    axes.legend(handles=[*handles, *axes.get_legend_handles_labels()[0]], title=title, title_fontsize=8, loc="best")
