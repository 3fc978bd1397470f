"""Draw distance over the network calls of sampling, for the objectives of a sweep. The paper has no such figure."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.curves import NoDataError
from report.models import kind_of, model_name
from report.objectives import key_of, names_of
from report.records import DISTANCE, num_calls
from report.study import Record, Study, protocol_of
from report.style import OBJECTIVE_STYLES, SAMPLER_LINES, label_axes, literal, log_x, log_y, new_figure

NAME = "objectives"
TITLE = "Distance over network calls, by objective"
NOTE = (
    "Lines are means over the runs of one objective, its seeds where nothing else differs; bands are their range. An "
    "objective is shown together with its sampler. Calls that guidance adds are counted."
)


@dataclass(frozen=True)
class Point:
    """The distances that the runs of an objective have at one number of network calls an image."""

    calls: float
    distances: tuple[float, ...]  # one for each run

    @property
    def mean(self) -> float:
        """Return the arithmetic mean over the runs."""
        return float(np.mean(self.distances))


@dataclass(frozen=True)
class Curve:
    """An objective with one sampler, over the network calls."""

    objective: str
    sampler: str
    points: tuple[Point, ...]  # by rising calls


def curves_over_calls(study: Study) -> dict[str, list[Curve]]:
    """Return, for each model, its curves by objective and sampler, from records that differ from the chosen in sampler.

    The last of equal records counts. Samplers whose cost is unknown are left out.
    """
    found: defaultdict[tuple[str, str, str], defaultdict[float, dict[str, float]]]
    found = defaultdict(lambda: defaultdict(dict))
    compared = {run: _comparable(study, run) for run in study.chosen}
    samplers = names_of([_without_steps(record) for records in compared.values() for record in records])
    for run, records in compared.items():
        for record in records:
            calls, sampler = num_calls(record), samplers[key_of(_without_steps(record))]
            if calls is not None:
                found[_model(study, record), study.objectives[run], sampler][calls][run] = record[DISTANCE]
    curves: defaultdict[str, list[Curve]] = defaultdict(list)
    for (model, objective, sampler), by_calls in sorted(found.items()):
        points = tuple(Point(calls, tuple(of_runs.values())) for calls, of_runs in sorted(by_calls.items()))
        curves[model].append(Curve(objective, sampler, points))
    return dict(curves)


def _comparable(study: Study, run: str) -> list[Record]:
    """Return a run's records that differ from its chosen one in nothing but the sampler."""
    way = protocol_of(study.chosen[run], but=("sampler",))
    return [record for record in study.records[run] if protocol_of(record, but=("sampler",)) == way]


def _without_steps(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record["sampler"].items() if key != "steps"}


def _model(study: Study, record: Record) -> str:
    """Return a model's name, with its kind where the study has several."""
    several = len({kind_of(chosen) for chosen in study.chosen.values()}) > 1
    return f"{model_name(record)} {kind_of(record).name}" if several else model_name(record)


def figure_over_calls(study: Study) -> Figure:
    """Draw distance over network calls, a panel for each model that has several objectives."""
    curves = curves_over_calls(study)
    panels = {model: of_model for model, of_model in curves.items() if len({c.objective for c in of_model}) > 1}
    if not any(len(curve.points) > 1 for of_model in panels.values() for curve in of_model):
        raise NoDataError(
            "no model with several objectives was measured with several numbers of sampling steps, all else equal; run "
            "`ditscale evaluate -m checkpoint=RUN sampler.steps=4,10,25,50,100`."
        )
    figure = new_figure(4.6 * len(panels) + 2.6, 4.6)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    objectives = sorted({curve.objective for of_model in panels.values() for curve in of_model})
    styles = {name: OBJECTIVE_STYLES[i % len(OBJECTIVE_STYLES)] for i, name in enumerate(objectives)}
    for axes, (model, of_model) in zip(grid, panels.items(), strict=True):
        _draw(axes, of_model, styles)
        axes.set_title(literal(model))
        log_x(axes, widest=1000)
        log_y(axes)
        label_axes(axes, "Network calls for an image", study.distance_name if axes is grid[0] else "")
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right center")
    return figure


def _draw(axes: Axes, curves: Sequence[Curve], styles: dict[str, tuple[str, str]]) -> None:
    """Draw curves with the color and marker of their objective, and a line style for each of its samplers."""
    samplers: defaultdict[str, list[str]] = defaultdict(list)
    for curve in curves:
        color, marker = styles[curve.objective]
        line = SAMPLER_LINES[len(samplers[curve.objective]) % len(SAMPLER_LINES)]
        samplers[curve.objective].append(curve.sampler)
        calls = [point.calls for point in curve.points]
        lows, highs = ([end(point.distances) for point in curve.points] for end in (min, max))
        if any(len(point.distances) > 1 for point in curve.points):
            axes.fill_between(calls, lows, highs, color=color, alpha=0.16, linewidth=0)
        label = literal(f"{curve.objective}: {curve.sampler}")
        means = [point.mean for point in curve.points]
        axes.plot(calls, means, linestyle=line, marker=marker, color=color, label=label)
