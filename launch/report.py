"""``ditscale report``: turn the runs of a sweep into the paper's figures, a table and one page."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from core.atomic import write_bytes
from core.locks import locked
from core.progress import ProgressBar
from core.reading import is_regular
from evaluation.evaluate import distance_records
from launch.builders.build import LoadedCheckpoint
from launch.builders.components import build
from launch.command.settings import ReportSettings
from launch.jobs import start
from report.figures import figure_8
from report.page import interval_text
from report.samples import SampleGrid
from report.seeds import by_model
from report.study import Study, read_study
from report.style import content_of, styled
from report.write import Report, write_report
from runtime.protocol import Devices
from train.lines import is_cut
from train.loggers import Logger
from train.runfolder import RunFolder

CURVE = "fid_vs_gflops"


def report_job(config: ReportSettings, progress: ProgressBar) -> None:
    """Write figures, table and page; log the curve and the figures to the sweep's wandb group; print the rows."""
    sweep = Path(config.sweep)
    study = read_study(sweep)
    out = Path(config.out) if config.out else _default_folder(study)
    for name in sorted({*study.records, *study.unevaluated}) if study.has_folders else ():
        _warn_of_a_cut_line(RunFolder(sweep / name))
    report = write_report(study, out, _samples(config, study, progress))
    with _group_logger(config.logger, group_of(study), out, config.plain()) as logger:
        _log_curve(logger, study)
        step = study.protocol["step"]
        for number, picture in report.pictures.items():
            logger.log_image(f"figure_{number}", picture, step)
    print(_text(report))


def _default_folder(study: Study) -> Path:
    """Return the folder of a report: in the sweep's folder, or beside its file."""
    return study.sweep / "report" if study.has_folders else study.sweep.with_name(f"{study.sweep.stem}-report")


def _warn_of_a_cut_line(folder: RunFolder) -> None:
    if is_regular(folder.evaluations) and is_cut(folder.evaluations):
        print(
            f"warning: {folder.evaluations} ends in the middle of a line, which the report leaves out; repeat the "
            "evaluation that it held.",
            file=sys.stderr,
        )


def update_group(sweep: Path, group: str, logger: Mapping[str, Any]) -> None:
    """Log the curve of a sweep's finished runs, after a run of ``ditscale train`` has ended.

    Does nothing where no run is finished or the finished ones share no protocol. Parallel runs of a sweep take turns.
    """
    with locked(sweep / ".report.lock"):
        # Search while holding the lock: a run that waited must include those that ended meanwhile.
        finished = [path.parent.name for path in sweep.glob("*/config.yaml") if _is_finished(RunFolder(path.parent))]
        try:
            study = read_study(sweep, only=finished)
        except ValueError:  # no run is finished, or protocols differ; `ditscale report` says which
            return
        with _group_logger(logger, group, sweep / "report", {"sweep": str(sweep)}) as of_group:
            _log_curve(of_group, study)
            if len(study.scaling()) > 1 or len(study.kinds()) > 1:
                picture = sweep / "report" / "figure_8.png"
                with styled():
                    write_bytes(picture, content_of(figure_8(study), "png"))
                of_group.log_image("figure_8", picture, study.protocol["step"])


def _is_finished(folder: RunFolder) -> bool:
    """Return whether a run was measured at its last step. A run that cannot be read gets a warning, and False."""
    try:
        last = folder.read_config().get("total_steps")
        return any(record["step"] == last for record in distance_records(folder))
    except ValueError as error:
        print(f"warning: {folder.path.name} is left out of the sweep's curve: {error}", file=sys.stderr)
        return False


def group_of(study: Study) -> str:
    """Return the group that the runs were trained in, even where their folder was moved since; a file's name."""
    if not study.has_folders:
        return study.name
    group = RunFolder(study.sweep / next(iter(study.chosen))).read_config().get("group")
    return str(group or study.name)


@contextmanager
def _group_logger(section: Mapping[str, Any], group: str, out: Path, config: Mapping[str, Any]) -> Iterator[Logger]:
    """Yield the logger of the one wandb run that holds a group's curve; the run's id is kept in ``out``."""
    logger: Logger = build(section)(folder=out, group=group, name=f"{group}-report", config=config, job="report")
    try:
        yield logger
    finally:
        logger.finish()


def _log_curve(logger: Logger, study: Study) -> None:
    logger.log_table(CURVE, study.rows)
    logger.log_chart(f"{CURVE}_chart", study.rows, "gmacs", "frechet_distance", f"{study.distance_name} by Gflops")
    if (fit := study.fit()) is not None:
        logger.log(
            {
                "models": fit.count,
                "spearman_gflops_frechet_distance": fit.rank_correlation,
                "log_log_correlation": fit.correlation,
                "log_log_slope": fit.slope,
            }
        )


def _samples(config: ReportSettings, study: Study, progress: ProgressBar) -> SampleGrid | str:
    """Return images of the same noise and labels by each scaling figure's model, or why there are none.

    Each model is the newest checkpoint of its run, of several seeds that of the first.
    """
    count = config.samples
    if count < 1:
        return f"samples is {count}; set it higher."
    if not study.has_folders:
        return f"{study.sweep} has no checkpoints; give the folder that holds the runs."
    runtime: Devices = build(config.runtime, precision=config.precision.value)
    names, rows = [], []
    first = by_model({**record, "run": name} for name, record in study.scaling().items())
    with progress("samples", 0, len(first), "model") as bar:
        for name in (str(model.record["run"]) for model in first):
            try:
                checkpoint = LoadedCheckpoint.load(str(study.sweep / name), "ema", runtime)
            except ValueError as error:
                return f"{error}"
            generator = checkpoint.generator(config, config.seed, runtime)
            rows.append(generator.all_images(generator.conditions.in_turn(count), count, count))
            names.append(name)
            bar.update(1)
    if len({images.shape for images in rows}) > 1:
        return f"the models make images of different shapes: {sorted({images.shape[1:] for images in rows})}."
    return names, np.stack(rows)


def _text(report: Report) -> str:
    study = report.study
    header = f"{'run':40s} {'Gflops (GMACs)':>14s} {'distance':>9s} {'recognized':>10s}"
    lines = [f"{study.distance_name}, by rising compute:", header]
    lines += [
        f"{row['run']:40s} {row['gmacs']:14.6f} {row['frechet_distance']:9.1f} {_percent(row['recognized_fraction'])}"
        for row in study.rows
    ]
    if study.unevaluated:
        lines.append(f"Not evaluated, so not in the curve: {', '.join(study.unevaluated)}")
    if study.held_back is not None:
        lines.append(study.held_back)
    for kind in study.kinds():
        if (fit := study.fit(kind=kind)) is None:
            continue
        lines.append(f"For the {fit.count} {kind.models}:")
        over_seeds = "" if fit.rank_interval is None else f" ({interval_text(fit.rank_interval)})"
        lines.append(f"Spearman rank correlation of Gflops and distance: {fit.rank_correlation:.2f}{over_seeds}")
        low, high = fit.slope_interval
        lines.append(
            f"Slope in log-log {fit.slope:.2f} (95%: {low:.2f} to {high:.2f}), correlation {fit.correlation:.2f}"
        )
    lines += [f"No figure {number}: {reason}" for number, reason in report.missing.items()]
    drawn = ", ".join(str(number) for number in report.pictures)
    lines.append(
        f"{report.page} with figures {drawn}; the figures as PNG and SVG, and {report.table.name}, are next to it"
    )
    return "\n".join(lines)


def _percent(fraction: float | None) -> str:
    return f"{'-':>10s}" if fraction is None else f"{100 * fraction:9.1f}%"


if __name__ == "__main__":
    start("report")
