"""Scales, ticks and labels of the axes of the report's figures."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter


def once(axes: Axes, label: str) -> str | None:
    """Return the label, or None where the legend of the axes already has it: runs of several seeds share one."""
    return None if label in axes.get_legend_handles_labels()[1] else label


def literal(text: str) -> str:
    """Return a text of a record such that matplotlib shows it literally: two dollar signs would make a formula."""
    return text.replace("$", r"\$")


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Label the horizontal and the vertical axis."""
    axes.set_xlabel(x)
    axes.set_ylabel(literal(y))


def steps_axis(axes: Axes) -> None:
    """Show few ticks on the horizontal axis, formatted as 400K."""
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}K" if value >= 10_000 else f"{value:g}")
    )


def log_x(axes: Axes) -> None:
    """Make the horizontal axis logarithmic, with ticks at 1, 2 and 5 where little more than a decade is shown."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    if high < 30 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def log_y(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)
