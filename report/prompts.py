"""Draw how often the images of each prompt are recognized as what it asks for. The paper has no such figure."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.curves import NoDataError
from report.records import PromptCount
from report.study import Study
from report.style import GRAY, INK, literal, new_figure

NAME = "prompts"
TITLE = "Images recognized as the class that their prompt asks for"
NOTE = (
    "Bars are means over the models, and dots are single models where there are several. A prompt is held out where no "
    "caption of the training data equals it; the titles have the fraction of all images of a panel."
)
_LONGEST = 40  # characters of a prompt that are shown
# Title and color of the prompts that are held out, of those that are not, and of those of which it is not known.
_GROUPS = {
    False: ("Captions of the training data", "#0072b2"),
    True: ("Held out of training", "#d55e00"),
    None: ("Other prompts", GRAY),
}


@dataclass(frozen=True)
class Obeyed:
    """A prompt with the fraction of its images that are recognized, for each model."""

    prompt: str
    held_out: bool | None  # None: not known
    fractions: tuple[float, ...]
    images: int  # of all models together
    recognized: int  # likewise


def prompts_of(study: Study) -> list[Obeyed]:
    """Return the prompts of the chosen evaluations, in their order; none where they have none that ask for a class."""
    found: defaultdict[tuple[str, int, bool | None], list[PromptCount]] = defaultdict(list)
    for record in study.chosen.values():
        for fields in record.get("recognized_by_prompt") or ():
            count = PromptCount(**fields)
            found[count.prompt, count.label, count.held_out].append(count)
    return [
        Obeyed(
            prompt,
            held_out,
            tuple(count.recognized / count.images for count in counts),
            sum(count.images for count in counts),
            sum(count.recognized for count in counts),
        )
        for (prompt, _, held_out), counts in found.items()
    ]


def figure_of_prompts(study: Study) -> Figure:
    """Draw a bar for each prompt, and a panel for those that are held out of training."""
    prompts = prompts_of(study)
    if not prompts:
        raise NoDataError("no model was measured on prompts that ask for a class; give condition.prompt_classes.")
    panels = {held_out: [prompt for prompt in prompts if prompt.held_out is held_out] for held_out in _GROUPS}
    panels = {held_out: of_group for held_out, of_group in panels.items() if of_group}
    most = max(len(of_group) for of_group in panels.values())
    figure = new_figure(4.7 * len(panels) + 0.4, 0.17 * most + 1.2)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (held_out, of_group) in zip(grid, panels.items(), strict=True):
        title, color = _GROUPS[held_out]
        _draw(axes, of_group, color, most)
        images = sum(prompt.images for prompt in of_group)
        fraction = sum(prompt.recognized for prompt in of_group) / images
        axes.set_title(f"{title}: {100 * fraction:.1f}% of {images:,}")
    return figure


def _draw(axes: Axes, prompts: Sequence[Obeyed], color: str, rows: int) -> None:
    """Draw the bars of a panel with room for ``rows``, the first on top."""
    places = np.arange(len(prompts))
    axes.barh(places, [np.mean(prompt.fractions) for prompt in prompts], color=color, height=0.72)
    for place, prompt in zip(places, prompts, strict=True):
        if len(prompt.fractions) > 1:
            axes.plot(prompt.fractions, [place] * len(prompt.fractions), "o", color=INK, markersize=2.2, clip_on=False)
    axes.set_yticks(places, [literal(_short(prompt.prompt)) for prompt in prompts], fontsize=7)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("Fraction recognized")
    axes.grid(visible=False, axis="y")


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= _LONGEST else f"{prompt[: _LONGEST - 3]}..."
