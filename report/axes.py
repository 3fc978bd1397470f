"""Axes as the report's figures have them."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter


def once(axes: Axes, label: str) -> str | None:
    """The label, where the legend of the axes does not have it already: runs of several seeds share one."""
    return None if label in axes.get_legend_handles_labels()[1] else label


def literal(text: str) -> str:
    """Return what a record says as matplotlib shows it letter by letter: two dollar signs would begin a formula."""
    return text.replace("$", r"\$")


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Label the horizontal and the vertical one."""
    axes.set_xlabel(x)
    axes.set_ylabel(literal(y))


def steps_axis(axes: Axes) -> None:
    """Few ticks, as 400K."""
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}K" if value >= 10_000 else f"{value:g}")
    )


def log_x(axes: Axes) -> None:
    """Logarithmic; where little more than a decade is shown, with numbers at 1, 2 and 5, which do not overlap."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    if high < 30 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def log_y(axes: Axes) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)
