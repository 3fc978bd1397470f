"""Write the report as one HTML file that contains figures, grids and configs, and fetches nothing."""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from core.reading import DamagedFileError, read_regular
from report import paper
from report.fit import PowerLaw
from report.models import Kind, model_name
from report.study import COLUMNS, PROTOCOL_KEYS, Record, Study
from train.runfolder import RunFolder

# The facts that define a number, PROTOCOL_KEYS among them, in the order of the page.
SHOWN_KEYS = ("feature_extractor", "reference", "reference_images", *PROTOCOL_KEYS, "metrics", "classifier_accuracy")
TEMPLATE = Path(__file__).with_name("page.html.j2")
_MOST_BYTES_OF_CONFIG, _MOST_BYTES_OF_GRID = 2**20, 2**26


@dataclass(frozen=True)
class Shown:
    """A figure on the page, or the reason why it is missing."""

    number: int | str  # the paper's, or a name of ours
    title: str
    content: bytes | None
    reason: str | None
    kind: str = "svg+xml"
    note: str = ""

    @property
    def address(self) -> str:
        """Return the figure as a data URL, in which an image runs no script and shares no ids with others."""
        assert self.content is not None
        return _data_url(self.content, self.kind)


def runs_of(study: Study) -> list[dict[str, Any]]:
    """Return the details of each run for the page, none where runs have no folders.

    Raises ValueError where a file of a run cannot be shown.
    """
    if not study.has_folders:
        return []
    return [_run_of(study.sweep / name) for name in [*study.chosen, *study.unevaluated]]


def page_of(study: Study, figures: list[Shown], runs: list[dict[str, Any]]) -> str:
    """Return the whole HTML file."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = _number
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    every = [{"run": name, **record} for name, records in study.records.items() for record in records]
    return template.render(
        study=study,
        figures=figures,
        rows=_filled([_row(row) for row in study.rows]),
        every=[_evaluation(record) for record in every],
        fit_texts=[_fit_text(study.fit(kind=kind), kind) for kind in study.kinds()],
        protocol={key: _texts(study, key) for key in SHOWN_KEYS if key in study.protocol},
        runs=runs,
        beside_paper=any(paper.points_of(record) for record in study.chosen.values()),
    )


def _row(row: Record) -> dict[str, Any]:
    """Return a row of the first table, with readable column names; metrics come before costs."""
    hidden = {*COLUMNS, "objective", "fid"} - {"recognized_fraction"}
    shown = {"run": row["run"], "objective": row.get("objective"), "model": model_name(row), "block": row.get("block")}
    shown |= {"Gflops (GMACs)": row["gmacs"], "FID" if "fid" in row else "frechet distance": row["frechet_distance"]}
    shown |= {key.replace("_", " "): value for key, value in row.items() if key not in hidden}
    shown |= {"family": row["family"], "parameters": row["parameters"], "training GMACs": row["training_gmacs"]}
    return shown | {"step": row["step"], "seed": row["training_seed"]}


def _filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without columns that are empty in all of them."""
    return [{key: row[key] for key in row if any(other[key] is not None for other in rows)} for row in rows]


def _evaluation(record: Record) -> dict[str, Any]:
    """Return a row of the table of all evaluations: the number and its protocol."""
    named = {
        key: record.get(key) for key in ("run", "step", "frechet_distance", "evaluated_by", "weights", "num_images")
    }
    sampler, guidance = record["sampler"], record["guidance"]
    named |= {"sampler": sampler.get("name"), "sampling steps": sampler.get("steps"), "guidance": _text(guidance)}
    named |= {"objective": _text(record.get("objective") or "-")}  # absent in records of earlier versions
    named |= {key: record[key] for key in ("labels", "sampling_seed", "network_precision", "decoder")}
    named |= {key: record[key][:12] for key in ("reference_hash", "feature_extractor_hash")}
    return {key.replace("_", " "): value for key, value in named.items()}


def _run_of(path: Path) -> dict[str, Any]:
    """Return a run's config, and its newest grid of samples."""
    folder = RunFolder(path)
    grids = sorted(folder.samples.glob("step_*.png"))
    return {
        "name": path.name,
        "config": read_regular(folder.config, _MOST_BYTES_OF_CONFIG).decode("utf-8", errors="replace"),
        "grid": _data_url(_read_png(grids[-1]), "png") if grids else None,
        "grid_name": grids[-1].stem.replace("_", " ") if grids else None,
    }


def _read_png(path: Path) -> bytes:
    """Return a PNG's content. Raises DamagedFileError where a checksum in it is wrong, or it is not a PNG."""
    content = read_regular(path, _MOST_BYTES_OF_GRID)
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.verify()
    except Exception as error:  # of many types
        reason = " ".join(str(error).split())[:200]
        raise DamagedFileError(f"{path} is not a whole PNG ({reason}); remove it, or put it back.") from None
    return content


def _fit_text(fit: PowerLaw | None, kind: Kind) -> str:
    if fit is None:
        return f"There is no fit of the {kind.models}: it needs at least 3 models with different Gflops."
    low, high = fit.slope_interval
    over_seeds = "" if fit.rank_interval is None else f" ({interval_text(fit.rank_interval)})"
    return (
        f"log10(distance) = {fit.intercept:.3f} + {fit.slope:.3f} log10(Gflops) through the {fit.count} "
        f"{kind.models}; 95% confidence interval of the slope {low:.3f} to {high:.3f}. "
        f"Correlation {fit.correlation:.2f} of both logarithms, {fit.semilog_correlation:.2f} of log Gflops and the "
        f"distance (the paper's FID: -0.93), {fit.rank_correlation:.2f} of ranks{over_seeds}. The band assumes that "
        "the models deviate independently, and does not include the noise between seeds."
    )


def interval_text(interval: tuple[float, float]) -> str:
    """Return the words for the bootstrap interval of a rank correlation."""
    low, high = interval
    return f"95% bootstrap interval over seeds {low:.2f} to {high:.2f}"


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _text(value: Any) -> str:
    """Return a setting as short text."""
    if isinstance(value, Mapping) and "name" in value:
        rest = ", ".join(f"{key} {item}" for key, item in value.items() if key != "name")
        return f"{value['name']} ({rest})" if rest else str(value["name"])
    return value if isinstance(value, str) else json.dumps(value)


def _texts(study: Study, key: str) -> str:
    """Return a fact of the chosen records as short text: one, or where samplers differ, each."""
    return "; ".join(dict.fromkeys(_text(record[key]) for record in study.chosen.values() if key in record))


def _number(value: Any) -> str:
    """Return a cell's text: floats with 4 digits, trailing zeros included, text unchanged, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:#.4g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
