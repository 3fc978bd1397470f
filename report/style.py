"""Define the look of all figures: a color for each size and a marker for each patch size, the same in every figure."""

import io
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes

from report.study import Record, size_name

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
    "svg.hashsalt": "ditscale",  # the same runs give the same bytes
}
# From light to dark by rising size, so that color-blind readers also see the order.
_COLOURS = ("#e3a72f", "#3aa17e", "#3b7dd8", "#6a3d9a", "#b23a48", "#4d4d4d")
_MARKERS = {2: "o", 4: "s", 8: "^"}
_BLOCKS = {"AdaLNZeroBlock": "adaLN-Zero", "AdaLNBlock": "adaLN", "InContextBlock": "in-context"}
_BLOCKS["CrossAttentionBlock"] = "cross-attention"
_BLOCK_COLOURS = {"adaLN-Zero": "#6a3d9a", "adaLN": "#3b7dd8", "cross-attention": "#3aa17e", "in-context": "#e3a72f"}
GREY = "#8a8f98"
GFLOPS = "Gflops of a forward pass (giga multiply-adds)"


class Palette:
    """The colors of the model sizes of a study."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        sizes = {(record["depth"], record["width"]): size_name(record) for record in records}
        self._colours = {name: _COLOURS[i % len(_COLOURS)] for i, (_, name) in enumerate(sorted(sizes.items()))}

    def __call__(self, record: Mapping[str, Any]) -> str:
        """Return the color of a record's size."""
        return self._colours[size_name(record)]

    @property
    def by_size(self) -> dict[str, str]:
        """Return the colors by the sizes' names, smallest size first."""
        return self._colours


def marker(record: Mapping[str, Any]) -> str:
    """Return the marker of a record's patch size."""
    return _MARKERS.get(record["patch_size"], "D")


def block_name(block: str) -> str:
    """Return the paper's name for a class of blocks."""
    return _BLOCKS.get(block, block)


def block_colour(block: str) -> str:
    """Return the color of a class of blocks."""
    return _BLOCK_COLOURS.get(block_name(block), GREY)


def new_figure(width: float, height: float) -> matplotlib.figure.Figure:
    """Return an empty figure of a width and height in inches. Call it inside `styled`."""
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def styled() -> AbstractContextManager[None]:
    """Return a context with the style's settings, in which figures are drawn and written."""
    settings: AbstractContextManager[None] = matplotlib.rc_context(SETTINGS)
    return settings


def content_of(figure: matplotlib.figure.Figure, kind: str) -> bytes:
    """Return a figure as PNG or SVG bytes, without a timestamp in them."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def legend_of_sizes(axes: Axes, palette: Palette, records: Iterable[Record]) -> None:
    """Draw a legend with an entry for each size, each patch size, and each labeled artist of the axes."""
    handles = [
        matplotlib.lines.Line2D([], [], color=colour, linewidth=3, label=name)
        for name, colour in palette.by_size.items()
    ]
    for patch_size in sorted({record["patch_size"] for record in records}):
        shape = marker({"patch_size": patch_size})
        handles.append(
            matplotlib.lines.Line2D(
                [], [], color=GREY, marker=shape, linestyle="none", label=f"patch size {patch_size}"
            )
        )
    axes.legend(handles=[*handles, *axes.get_legend_handles_labels()[0]])
