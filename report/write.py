"""Write the files of ``ditscale report``: figures, a CSV, and a self-contained page."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from core.atomic import make_folder, require_no_folder, write_bytes
from report import over_calls, prompts
from report.curves import NoDataError
from report.figures import FIGURES
from report.page import Shown, page_of, runs_of
from report.runs import COLLECTED, collected
from report.samples import SampleGrid, figure_7
from report.study import Study
from report.style import content_of, styled

_BEGINNINGS_OF_FORMULAS = ("=", "+", "-", "@")
NO_SAMPLES = "no samples were asked for; run `ditscale report sweep=... samples=8`."


@dataclass(frozen=True)
class Report:
    """The results of `write_report`."""

    study: Study
    page: Path
    table: Path
    pictures: dict[int | str, Path]  # PNGs by the paper's number, or a name of ours; an .svg lies next to each
    missing: dict[int | str, str]  # the reason for each figure that was not drawn


def write_report(study: Study, out: Path, samples: SampleGrid | str = NO_SAMPLES) -> Report:
    """Write ``figure_N.png``, ``figure_N.svg``, ``fid_vs_gflops.csv``, ``report.html``, and ``study.jsonl``.

    The last has all evaluations, and a report of it has the same figures, without the runs' folders.

    ``samples`` are images of the same noise and labels by all models, for figure 7, or the reason why there are none.
    Figures of an earlier report that these runs do not support any more are deleted.
    """
    runs = runs_of(study)  # first, since it is fast and fails on damaged files
    pictures: dict[int | str, Path] = {}
    missing: dict[int | str, str] = {}
    shown: list[Shown] = []
    files: dict[Path, bytes | None] = {}  # written once all are complete; None deletes a file
    if not study.has_several_objectives:
        files |= dict.fromkeys(_paths(out, over_calls.NAME))
    if not prompts.prompts_of(study):
        files |= dict.fromkeys(_paths(out, prompts.NAME))
    with styled():
        for number, title, draw, note in _drawers(study, samples):
            paths = _paths(out, number)
            try:
                figure = draw()
            except NoDataError as reason:
                missing[number] = str(reason)
                files |= dict.fromkeys(paths)
                shown.append(Shown(number, title, None, str(reason)))
                continue
            png, svg = (content_of(figure, kind) for kind in ("png", "svg"))
            files |= dict(zip(paths, (png, svg), strict=True))
            pictures[number] = paths[0]
            content, kind = (svg, "svg+xml") if number != 7 else (png, "png")
            shown.append(Shown(number, title, content, None, kind, note))
    table, page = out / "fid_vs_gflops.csv", out / "report.html"
    files |= {table: csv_of(study.rows), page: page_of(study, shown, runs).encode()}
    files[out / COLLECTED] = collected(study.records)
    _write(out, files)
    return Report(study, page, table, pictures, missing)


def _paths(out: Path, number: int | str) -> list[Path]:
    return [out / f"figure_{number}.{kind}" for kind in ("png", "svg")]


def _write(out: Path, files: Mapping[Path, bytes | None]) -> None:
    """Write all files, and delete those without content. Raises ValueError, before any is written, where one cannot."""
    make_folder(out)
    for path in files:
        require_no_folder(path)
    for path, content in files.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            write_bytes(path, content)


def _drawers(study: Study, samples: SampleGrid | str) -> list[tuple[int | str, str, Any, str]]:
    """Return number, title, drawing function and note of each figure: the paper's, and then ours, which have names."""

    def draw_samples() -> Figure:
        if isinstance(samples, str):
            raise NoDataError(samples)
        return figure_7(samples, study)

    drawers: list[tuple[int | str, str, Any, str]] = [
        (figure.number, figure.title, lambda draw=figure.draw: draw(study), figure.note(study)) for figure in FIGURES
    ]
    drawers.append((7, "The same noise and label through all models", draw_samples, ""))
    if study.has_several_objectives:
        name, title, note = over_calls.NAME, over_calls.TITLE, over_calls.NOTE
        drawers.append((name, title, lambda: over_calls.figure_over_calls(study), note))
    if prompts.prompts_of(study):
        drawers.append((prompts.NAME, prompts.TITLE, lambda: prompts.figure_of_prompts(study), prompts.NOTE))
    return sorted(drawers, key=lambda drawer: (isinstance(drawer[0], str), drawer[0]))


def csv_of(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows with equal keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _inert(value) for key, value in row.items()} for row in rows)
    return text.getvalue().encode()


def _inert(value: Any) -> Any:
    """Return a cell that spreadsheets do not evaluate: text that begins like a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_BEGINNINGS_OF_FORMULAS) else value
