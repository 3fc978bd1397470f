"""Define the style of all figures and their axes: one color for each size and one marker for each patch size."""

import io
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from report.models import Kind, patch_name, patch_order, size_name, size_order
from report.records import Record

SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "axes.grid": True,
    "grid.color": "#e6e8ec",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#5a606b",
    "ytick.color": "#5a606b",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "figure.dpi": 130,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",  # looks the same everywhere
    "svg.hashsalt": "ditscale",  # makes the bytes reproducible
}
# Light to dark by increasing size, so that color-blind readers see the order.
_COLORS = ("#e3a72f", "#3aa17e", "#3b7dd8", "#6a3d9a", "#b23a48", "#4d4d4d")
_MARKERS = {2: "o", 4: "s", 8: "^"}
_BLOCK_COLORS = {"adaLN-Zero": "#6a3d9a", "adaLN": "#3b7dd8", "cross-attention": "#3aa17e", "in-context": "#e3a72f"}
# Color and marker of objectives: colors that differ for color-blind readers (Okabe and Ito), without the yellow.
OBJECTIVE_STYLES = (
    ("#000000", "o"),
    ("#0072b2", "s"),
    ("#56b4e9", "^"),
    ("#009e73", "D"),
    ("#e69f00", "v"),
    ("#d55e00", "P"),
    ("#cc79a7", "X"),
    ("#7a7a7a", "*"),
)
# Of families of networks, the paper's DiT first: colors of Okabe and Ito.
FAMILY_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7a7a7a")
SAMPLER_LINES = ("-", "--", ":", "-.")
GRAY, INK = "#8a8f98", "#30343b"
GFLOPS = "Gflops of a forward pass (giga multiply-adds)"


class Palette:
    """The colors of the sizes of a study."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        names = [size_name(record) for record in sorted(records, key=size_order)]
        self._colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(dict.fromkeys(names))}

    def __call__(self, record: Mapping[str, Any]) -> str:
        """Return the color of a record's size."""
        return self._colors[size_name(record)]

    @property
    def by_size(self) -> dict[str, str]:
        """Return the colors by name of the size, smallest first."""
        return self._colors


def marker(record: Mapping[str, Any]) -> str:
    """Return the marker of a record's patch size."""
    return _MARKERS.get(record.get("patch_size", 0), "D")


def kind_colors(kinds: Iterable[Kind]) -> dict[Kind, str]:
    """Return the color of each kind of model: that of its block type, or else one that no other of them has."""
    others = sorted({kind for kind in kinds if kind.name not in _BLOCK_COLORS}, key=lambda kind: kind.name)
    free = {kind: FAMILY_COLORS[1 + i % (len(FAMILY_COLORS) - 1)] for i, kind in enumerate(others)}
    return {kind: _BLOCK_COLORS.get(kind.name) or free[kind] for kind in kinds}


def new_figure(width: float, height: float) -> matplotlib.figure.Figure:
    """Return an empty figure of this size in inches. Call it inside `styled`."""
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def new_grid(count: int, columns: int) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """Return a figure of ``count`` panels in rows of at most ``columns``, with one vertical axis, and its panels."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(3.2 * columns + 0.6 + (columns == 1), max(2.9 * rows + 0.2, 3.9))  # room for the label's text
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat)


def styled() -> AbstractContextManager[None]:
    """Return a context manager that applies the style; draw and write figures inside it."""
    settings: AbstractContextManager[None] = matplotlib.rc_context(SETTINGS)
    return settings


def content_of(figure: matplotlib.figure.Figure, kind: str) -> bytes:
    """Return the bytes of a png or svg, without a date."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def legend_of_sizes(axes: Axes, palette: Palette, records: Iterable[Record]) -> None:
    """Add a legend with an entry for each size, each patch size, and each labeled artist of the axes."""
    handles = [
        matplotlib.lines.Line2D([], [], color=color, linewidth=3, label=name) for name, color in palette.by_size.items()
    ]
    by_patch = {patch_name(record): marker(record) for record in sorted(records, key=patch_order, reverse=True)}
    for name, shape in by_patch.items():
        handles.append(matplotlib.lines.Line2D([], [], color=GRAY, marker=shape, linestyle="none", label=name))
    axes.legend(handles=[*handles, *axes.get_legend_handles_labels()[0]])


def once(axes: Axes, label: str) -> str | None:
    """Return the label, or None if the legend of the axes already has it: runs of several seeds share one entry."""
    return None if label in axes.get_legend_handles_labels()[1] else label


def literal(text: str) -> str:
    """Return text of a record escaped for matplotlib, which would render text between two dollar signs as a formula."""
    return text.replace("$", r"\$")


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Label the horizontal and the vertical axis."""
    axes.set_xlabel(x)
    axes.set_ylabel(literal(y))


def steps_axis(axes: Axes) -> None:
    """Set at most five ticks on the horizontal axis, written as 400K."""
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}K" if value >= 10_000 else f"{value:g}")
    )


def log_x(axes: Axes, widest: float = 30) -> None:
    """Make the horizontal axis logarithmic, with plain numbers at 1, 2 and 5 up to a range of ``widest`` times."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    if high < widest * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def log_y(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers at 1, 2 and 5 of each decade, in a short range at more."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 3 * low else (1, 1.2, 1.4, 1.6, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)
