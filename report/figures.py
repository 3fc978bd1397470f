"""Draw the paper's figures from the runs of a sweep. `NoDataError` says why a figure cannot be drawn."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report import paper
from report.bubbles import Bubble, draw_bubbles, draw_systems
from report.curves import (
    NoDataError,
    annotate_names,
    curves_of,
    draw_curves,
    draw_line,
    draw_models,
    legend_of_curves,
    scaling_of,
)
from report.fit import CONFIDENCE
from report.models import kind_of, model_name, patch_name, patch_names, size_name
from report.records import DISTANCE
from report.seeds import Seeds, by_model, curves_by_model
from report.study import MEASURES, Measure, Record, Study, distance_name, number_of
from report.style import (
    GFLOPS,
    GRAY,
    Palette,
    kind_colors,
    label_axes,
    legend_of_sizes,
    literal,
    log_x,
    log_y,
    marker,
    new_figure,
    new_grid,
    once,
    steps_axis,
)


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper."""

    number: int
    title: str
    draw: Callable[[Study], Figure]
    note: Callable[[Study], str] = lambda study: ""  # how it differs from the paper's figure


def figure_2(study: Study) -> Figure:
    """Draw distance against Gflops as bubbles with area by Gflops; on the right our best model and other systems."""
    curves = curves_of(study)
    models = scaling_of(study, 2) if len(curves) == 1 else [model for curve in curves for model in curve.models]
    best = _best_beside_table_2(study)
    figure = new_figure(11 if best else 6.4, 4.4)
    left, *right = figure.subplots(1, 2 if best else 1, squeeze=False)[0]
    palette = Palette([*(model.record for model in models), *([best] if best else [])])
    bubbles = [
        _bubble(model, palette(model.record) if len(curves) == 1 else curve.color)
        for curve in curves
        for model in curve.models
    ]
    draw_bubbles(left, bubbles, study.distance_name)
    if len(curves) > 1:
        legend_of_curves(left, curves)
    left.set_title(f"Each model after {_moment(study)}; area by Gflops")
    if best:
        draw_systems(right[0], best, palette(best))
    return figure


def _bubble(model: Seeds, color: str) -> Bubble:
    record, values = model.record, model.values()
    ends = (min(values), max(values)) if len(values) > 1 else None
    return Bubble(model_name(record), record["gmacs"], model.mean(), color, ends)


def note_of_figure_2(study: Study) -> str:
    """Return a note that explains the right panel, or how to get it."""
    if _best_beside_table_2(study):
        return (
            "Right: our best model, and the systems of the paper's table 2, FID-50K as published, with the Gflops of "
            "its table 6; each was trained, sampled and measured in its own way."
        )
    return (
        "This is the left panel of the paper's figure. The right one, the best model beside ADM and LDM, is drawn "
        "once a model has an FID of 50,000 images against ADM's reference at 256 px."
    )


def figure_5(study: Study) -> Figure:
    """Draw block types over training, a panel for each size and patch size that has several."""
    of_blocks = {name for name, record in study.chosen.items() if record.get("block") and study.is_main(name)}
    curves = {name: records for name, records in study.over_training().items() if name in of_blocks}
    of_model: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(curves, key=lambda name: study.chosen[name]["gmacs"]):
        of_model[model_name(study.chosen[name])].append(name)
    panels = {model: names for model, names in of_model.items() if len({kind_of(study.chosen[n]) for n in names}) > 1}
    if not panels:
        raise NoDataError("no size and patch size has runs of two block types; sweep model/block.")
    colors = kind_colors([kind_of(study.chosen[name]) for names in panels.values() for name in names])
    figure, grid = new_grid(len(panels), columns=3)
    for axes, (model, names) in zip(grid, panels.items(), strict=False):
        lines = curves_by_model([curves[name] for name in names], _step)
        for line in lines:
            kind = kind_of(line[0].record)
            draw_line(axes, line, _step, "o-", colors[kind], label=once(axes, literal(kind.name)), alpha=0.9)
        for line in lines:
            _rings_over_training(axes, line[-1].record, colors[kind_of(line[0].record)])
        axes.set_title(model)
        steps_axis(axes)
        axes.legend()
        log_y(axes)
    figure.supxlabel("Training steps", fontsize=9)
    figure.supylabel(literal(study.distance_name), fontsize=9)
    return figure


def figure_6(study: Study) -> Figure:
    """Draw distance over training: at the top all sizes by patch size, at the bottom all patch sizes by size."""
    curves = study.over_training()
    names = list(study.scaling())
    if max(len(curves[name]) for name in names) < 2:
        raise NoDataError(
            "no run was measured at two steps in one protocol; train longer, or with a smaller evaluate_every."
        )
    records = [study.chosen[name] for name in names]
    patches = patch_names(records)
    palette = Palette(records)
    sizes = list(palette.by_size)
    columns = max(len(patches), len(sizes))
    figure = new_figure(2.7 * columns + 0.6, 5.4)
    axes_ = figure.subplots(2, columns, squeeze=False, sharey=True)
    shades = dict(zip(patches, np.linspace(0.35, 1, len(patches)) if len(patches) > 1 else [1.0], strict=True))
    for axes in axes_.flat:
        axes.set_visible(False)
    rows: list[tuple[int, str, list[str]]] = [
        *((0, p, [n for n in names if patch_name(study.chosen[n]) == p]) for p in patches),
        *((1, size, [n for n in names if size_name(study.chosen[n]) == size]) for size in sizes),
    ]
    places = {0: itertools.count(), 1: itertools.count()}
    for row, title, members in rows:
        axes = axes_[row, next(places[row])]
        axes.set_visible(True)
        lines = curves_by_model([curves[name] for name in members], _step)
        for line in lines:
            record = line[0].record
            label = once(axes, size_name(record) if row == 0 else patch_name(record))
            alpha = 1 if row == 0 else shades[patch_name(record)]
            draw_line(axes, line, _step, marker(record) + "-", palette(record), label=label, alpha=alpha)
        for line in lines:
            _rings_over_training(axes, line[-1].record, palette(line[0].record))
        axes.set_title(title)
        steps_axis(axes)
        axes.legend()
        log_y(axes)
    figure.supxlabel("Training steps", fontsize=9)
    figure.supylabel(literal(study.distance_name), fontsize=9)
    return figure


def figure_8(study: Study) -> Figure:
    """Draw distance against Gflops on logarithmic axes, with the fit, or with each family's where there are several."""
    curves = curves_of(study)
    models = scaling_of(study, 2) if len(curves) == 1 else [model for curve in curves for model in curve.models]
    records = [record for model in models for record in model.records]
    figure = new_figure(6.8, 4.6)
    axes, palette = figure.subplots(), Palette(records)
    if paper.shares_figure_8(study.protocol):
        _rings(axes, [(point.gmacs, point.fid) for point in paper.SWEEP], GRAY)
        for point in paper.SWEEP:
            if point.model not in map(model_name, records):
                place = (point.gmacs, point.fid)
                axes.annotate(point.model, place, (7, 4), textcoords="offset points", fontsize=7.5, color=GRAY)
    if len(curves) == 1:
        _points_and_fit(axes, study, DISTANCE, palette, names=True)
    else:
        draw_curves(axes, curves)
    floor = study.protocol["frechet_distance_of_real_resample"]
    if floor is not None and floor > min(_values(records)) / 4:  # a lower line would squeeze the curve
        axes.axhline(floor, linestyle=":", color=GRAY, linewidth=1.2)
        axes.annotate(
            "real images, resampled",
            (1, floor),
            (-4, 3),
            ("axes fraction", "data"),
            "offset points",
            ha="right",
            fontsize=7.5,
            color=GRAY,
        )
    log_y(axes)
    label_axes(axes, GFLOPS, study.distance_name)
    fit = study.fit()
    held = f": slope {fit.slope:.2f}, correlation {fit.correlation:.2f}" if fit else ""
    held = held if len(curves) == 1 else ", by family"
    axes.set_title(f"{literal(study.distance_name.split(' on ')[0])} against Gflops{held}")
    return figure


def figure_9(study: Study) -> Figure:
    """Draw distance against training compute, for all models over training."""
    curves = study.over_training()
    names = [name for name in study.scaling() if len(curves[name]) > 1]
    if not names:
        raise NoDataError(
            "no run was measured at two steps in one protocol; train longer, or with a smaller evaluate_every."
        )
    figure = new_figure(6.8, 4.6)
    axes = figure.subplots()
    _training_compute(axes, study, DISTANCE)
    records = list(study.scaling().values())
    for record in records:
        _rings(axes, [(p.training_gmacs, p.fid) for p in paper.points_of(record)], Palette(records)(record))
    legend_of_sizes(axes, Palette(records), records)
    log_y(axes)
    label_axes(axes, "Training compute (giga multiply-adds: Gflops x images seen x 3)", study.distance_name)
    axes.set_title("At equal training compute")
    return figure


def figure_10(study: Study) -> Figure:
    """Draw distance against sampling compute, a line for each model over its numbers of steps."""
    curves = study.over_sampling_steps()
    if not curves:
        raise NoDataError(
            "no checkpoint was measured with several numbers of sampling steps, all else equal; run "
            "`ditscale evaluate -m checkpoint=RUN sampler.steps=16,32,64,128,256,1000`."
        )
    every = [records[0] for records in curves.values()]
    figure = new_figure(6.8, 4.6)
    axes, palette = figure.subplots(), Palette(every)
    for line in curves_by_model(curves.values(), _sampling_gmacs):
        record = line[0].record
        style = marker(record) + ("-" if kind_of(record) == study.main_kind else ":")
        draw_line(axes, line, _sampling_gmacs, style, palette(record))
        points = paper.sampling_points_of(record)
        places = [(point.sampling_gmacs, point.fid) for point in points]
        _rings(axes, places, palette(record), paper.FIGURE_10_NAME)
        for end in (line[0], line[-1]):
            axes.annotate(
                f"{end.record['sampler']['steps']}",
                (_sampling_gmacs(end.record), end.mean()),
                (4, 4),
                textcoords="offset points",
                fontsize=6.5,
                color=GRAY,
            )
    log_x(axes)
    legend_of_sizes(axes, palette, every)
    log_y(axes)
    label_axes(axes, "Sampling compute of an image (giga multiply-adds: Gflops x steps)", distance_name(every[0]))
    axes.set_title("At equal sampling compute (numbers: steps)")
    return figure


def figure_12(study: Study) -> Figure:
    """Draw the other metrics, on the left over training compute, on the right against Gflops."""
    found = [m for m in MEASURES if all(number_of(r, m.key) is not None for r in study.scaling().values())]
    if not found:
        raise NoDataError(
            "the runs hold no metric besides the distance; measure with "
            "evaluation.metrics=[fid,sfid,inception_score,precision_recall] (or [frechet,precision_recall])."
        )
    scaling_of(study, 2)
    records = list(study.scaling().values())
    palette = Palette(records)
    figure = new_figure(8.4, 2.7 * len(found) + 0.3)
    grid = figure.subplots(len(found), 2, squeeze=False, sharey="row")
    for (left, right), measure in zip(grid, found, strict=True):
        _training_compute(left, study, measure.key)
        _points_and_fit(right, study, measure.key, palette, names=False)
        arrow = "lower is better" if measure.better == "lower" else "higher is better"
        label_axes(left, "", f"{measure.name}\n({arrow})")
        right.set_title(_held(study, measure), loc="right", fontweight="normal", fontsize=8)
    legend_of_sizes(grid[0, 0], palette, records)
    grid[-1, 0].set_xlabel("Training compute (giga multiply-adds)")
    grid[-1, 1].set_xlabel(GFLOPS)
    return figure


FIGURES = (
    PaperFigure(2, "Distance and Gflops of all models", figure_2, note_of_figure_2),
    PaperFigure(5, "Block types over training", figure_5),
    PaperFigure(6, "All models over training, by patch size and by model size", figure_6),
    PaperFigure(8, "Distance against Gflops", figure_8),
    PaperFigure(9, "Distance against training compute", figure_9),
    PaperFigure(10, "Distance against sampling compute", figure_10),
    PaperFigure(12, "Other metrics against training compute and Gflops", figure_12),
)


def _best_beside_table_2(study: Study) -> Record | None:
    """Return the evaluation with the lowest FID, among guided ones if there are any, as in the paper."""
    fitting = [r for records in study.records.values() for r in records if paper.shares_table_2(r)]
    guided = [record for record in fitting if paper.is_guided(record)]
    return min(guided or fitting, key=lambda record: record["fid"], default=None)


def _rings(axes: Axes, points: Sequence[tuple[float, float]], color: str, label: str = paper.TABLE_4_NAME) -> None:
    """Draw the paper's own points as rings behind ours, with one legend entry."""
    for x, y in points:
        named = once(axes, label)
        axes.plot(x, y, "o", color="none", markeredgecolor=color, markersize=9, zorder=1, label=named)


def _rings_over_training(axes: Axes, last: Record, color: str) -> None:
    """Draw the paper's points up to the last step of our curve, since later ones would squeeze the curves."""
    points = [p for p in paper.points_of(last) if p.step <= last["step"]]
    _rings(axes, [(point.step, point.fid) for point in points], color)


def _points_and_fit(axes: Axes, study: Study, key: str, palette: Palette, names: bool) -> None:
    models = by_model(study.scaling().values())
    fit = study.fit(key) if key == DISTANCE else None
    x = [model.record["gmacs"] for model in models]
    if fit:
        line = np.geomspace(min(x) / 1.3, max(x) * 1.3, 100)
        low, high = fit.band(line)
        axes.fill_between(line, low, high, color="#c9ced8", alpha=0.45, linewidth=0, label=f"{CONFIDENCE:.0%} band")
        axes.plot(line, fit.at(line), "--", color="#5a606b", linewidth=1.2, label=f"fit to {fit.count} models")
    draw_models(axes, models, key, [palette(model.record) for model in models])
    if names:
        annotate_names(axes, models, key)
    axes.margins(x=0.1, y=0.12)
    log_x(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left")


def _training_compute(axes: Axes, study: Study, key: str) -> None:
    curves, records = study.over_training(key), study.scaling()
    palette = Palette(records.values())
    measured = [[r for r in curves[name] if number_of(r, key) is not None] for name in records]
    for line in curves_by_model(measured, _training_gmacs):
        record = line[0].record
        draw_line(axes, line, _training_gmacs, marker(record) + "-", palette(record), key=key, alpha=0.9)
    log_x(axes)


def _held(study: Study, measure: Measure) -> str:
    records = list(study.scaling().values())
    values, gmacs = [record[measure.key] for record in records], [record["gmacs"] for record in records]
    if len(set(values)) < 3 or len(set(gmacs)) < 2:
        return ""
    correlation = np.corrcoef(np.log10(gmacs), values)[0, 1]
    return f"correlation with log Gflops {correlation:.2f}"


def _step(record: Record) -> float:
    return int(record["step"])


def _training_gmacs(record: Record) -> float:
    return float(record["training_gmacs"])


def _sampling_gmacs(record: Record) -> float:
    return float(record["sampling_gmacs"])


def _values(records: Sequence[Record]) -> list[float]:
    return [record[DISTANCE] for record in records]


def _moment(study: Study) -> str:
    return f"{study.protocol['images_seen']:,} images seen"
