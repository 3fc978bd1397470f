"""Bubbles of figure 2: models, and the systems that the paper compares its best one with."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from evaluation.report import paper
from evaluation.report.axes import label_axes, log_x
from evaluation.report.study import Record, distance_name, model_name
from evaluation.report.style import GFLOPS, GREY


def draw_systems(axes: Axes, best: Record, colour: str) -> None:
    """Table 2, with guidance or without, as our best record is; ours on top, its name to the right."""
    guided = paper.is_guided(best)
    systems = [Bubble(s.name, s.gmacs, s.fid, GREY) for s in paper.TABLE_2 if s.is_guided == guided]
    draw_bubbles(axes, systems, distance_name(best))
    ours, part_of_largest = (best["gmacs"], best["fid"]), best["gmacs"] / max(s.gmacs for s in systems)
    axes.scatter(*ours, s=_bubble_area(part_of_largest), color=colour, edgecolor="white")
    axes.annotate(f"ours: {model_name(best)}", ours, (14, 0), textcoords="offset points", va="center", weight="bold")
    axes.set_ylim(0, 1.2 * max(best["fid"], *(system.distance for system in systems)))
    axes.set_title(f"{'With' if guided else 'Without'} guidance, beside the paper's table 2")


class Bubble(NamedTuple):
    """A model or system; Gflops are giga multiply-adds."""

    name: str
    gmacs: float
    distance: float
    colour: str


def _bubble_area(part_of_largest: float) -> float:
    """In square points."""
    return 60 + 1500 * part_of_largest**0.6


def draw_bubbles(axes: Axes, bubbles: Sequence[Bubble], distance: str) -> None:
    """Small ones over large ones; names below and above in turn, so that those of neighbours stay apart."""
    rising = sorted(bubbles, key=lambda bubble: bubble.gmacs)
    for i, bubble in reversed(list(enumerate(rising))):
        area = _bubble_area(bubble.gmacs / rising[-1].gmacs)
        place = (bubble.gmacs, bubble.distance)
        axes.scatter(*place, s=area, color=bubble.colour, alpha=0.75, edgecolor="white", linewidth=1.2)
        side, foot = ((-1, "top"), (1, "bottom"))[i % 2]
        away = (0, side * (area**0.5 / 2 + 2))
        axes.annotate(bubble.name, place, away, textcoords="offset points", ha="center", va=foot, fontsize=7.5)
    axes.margins(x=0.14)
    log_x(axes)
    axes.set_ylim(0, 1.2 * max(bubble.distance for bubble in bubbles))
    label_axes(axes, GFLOPS, distance)
