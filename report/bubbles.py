"""Draw the bubbles of figure 2: models, and the systems that the paper compares its best model with."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from report import paper
from report.models import model_name
from report.study import Record, distance_name
from report.style import GFLOPS, GRAY, INK, label_axes, log_x


def draw_systems(axes: Axes, best: Record, color: str) -> None:
    """Draw table 2's systems, with guidance or without like our best record, and that record on top of them."""
    guided = paper.is_guided(best)
    systems = [Bubble(s.name, s.gmacs, s.fid, GRAY) for s in paper.TABLE_2 if s.is_guided == guided]
    draw_bubbles(axes, systems, distance_name(best))
    ours, part_of_largest = (best["gmacs"], best["fid"]), best["gmacs"] / max(s.gmacs for s in systems)
    axes.scatter(*ours, s=_bubble_area(part_of_largest), color=color, edgecolor="white")
    axes.annotate(f"ours: {model_name(best)}", ours, (14, 0), textcoords="offset points", va="center", weight="bold")
    axes.set_ylim(0, 1.2 * max(best["fid"], *(system.distance for system in systems)))
    axes.set_title(f"{'With' if guided else 'Without'} guidance, beside the paper's table 2")


class Bubble(NamedTuple):
    """A model or system; Gflops are giga multiply-adds."""

    name: str
    gmacs: float
    distance: float
    color: str
    ends: tuple[float, float] | None = None  # the least and the greatest distance of several seeds


def _bubble_area(part_of_largest: float) -> float:
    """Return the area of a bubble in square points."""
    return 60 + 1500 * part_of_largest**0.6


def _names_above(rising: Sequence[Bubble]) -> list[bool]:
    """Return whether each name is above its bubble: alternately, but above for the higher of two close bubbles."""
    above = [i % 2 == 1 for i in range(len(rising))]
    for i, (one, next_) in enumerate(itertools.pairwise(rising)):
        if next_.gmacs < 1.15 * one.gmacs and above[i] == (one.distance < next_.distance):
            above[i], above[i + 1] = above[i + 1], above[i]
    return above


def draw_bubbles(axes: Axes, bubbles: Sequence[Bubble], distance: str) -> None:
    """Draw bubbles with their names, small ones over large ones."""
    rising = sorted(bubbles, key=lambda bubble: bubble.gmacs)
    for bubble, is_above in reversed(list(zip(rising, _names_above(rising), strict=True))):
        area = _bubble_area(bubble.gmacs / rising[-1].gmacs)
        place = (bubble.gmacs, bubble.distance)
        axes.scatter(*place, s=area, color=bubble.color, alpha=0.75, edgecolor="white", linewidth=1.2)
        if bubble.ends is not None:
            axes.vlines(bubble.gmacs, *bubble.ends, color=INK, linewidth=1.1)
        side, foot = (1, "bottom") if is_above else (-1, "top")
        away = (0, side * (area**0.5 / 2 + 2))
        axes.annotate(bubble.name, place, away, textcoords="offset points", ha="center", va=foot, fontsize=7.5)
    axes.margins(x=0.14)
    log_x(axes)
    axes.set_ylim(0, 1.2 * max(max(bubble.ends or (bubble.distance,)) for bubble in bubbles))
    label_axes(axes, GFLOPS, distance)
