"""Sample what the page's fields ask for, as ``ditscale sample`` does, and show the images as they are denoised."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from core.closest import closest
from data.conditions import rows_of
from diffusion.watching import Watcher
from evaluation.generate import Generator, equal_rounds
from evaluation.grid import columns_of, grid_of
from launch.builders.build import LoadedCheckpoint, has_condition
from launch.builders.choices import Section, fitting_samplers, sections_of
from launch.builders.components import build, target_of
from launch.builders.conditioned import conditioned
from launch.builders.foreign import is_foreign, load_foreign
from launch.command.check import check_parameters
from launch.command.settings import ServeSettings
from launch.page.fields import Asked, Facts, Fields, fields_for
from launch.page.streams import Show, Streams
from launch.sample import GRID_IMAGES
from runtime.protocol import Devices

_BLANK = 255  # white: images that are not begun


class Form(NamedTuple):
    """The values of the page's fields, which nothing has checked."""

    seed: Any
    num_images: Any
    sampler: Any
    steps: Any
    scale: Any
    asked: Sequence[Any]


class View(NamedTuple):
    """A view of the grid, with a line of text."""

    picture: NDArray[np.uint8]  # [height, width, 3] or [height, width]
    text: str


@dataclass(frozen=True)
class Order:
    """A checked form."""

    generator: Generator
    num_images: int
    asked: Asked
    text: str


@dataclass(frozen=True)
class Studio:
    """A checkpoint with what the page offers for it."""

    config: ServeSettings
    checkpoint: LoadedCheckpoint
    runtime: Devices
    fields: Fields
    samplers: dict[str, Section]  # by name; the page begins with the first
    guidance: Section | None  # with a scale, or None where the page has none
    streams: Streams[View]

    @classmethod
    def of(cls, config: ServeSettings) -> "Studio":
        """Load the checkpoint of a config, and find out what fits it. Prints notes on what does not.

        Raises ValueError where the checkpoint cannot be loaded or sampled from, and for several processes.
        """
        runtime: Devices = build(config.runtime, precision=config.precision.value)
        if runtime.data_world > 1:
            raise ValueError(f"ditscale serve runs in one process, but there are {runtime.data_world}; start one.")
        checkpoint = _loaded(config, runtime)
        checkpoint = conditioned(checkpoint, config, runtime)
        conditions, name = checkpoint.conditions, str(checkpoint.path)
        knows_null = checkpoint.class_dropout > 0 and has_condition(conditions, checkpoint.spec)
        samplers = fitting_samplers(config.sampler, checkpoint.objective, config.runtime, runtime.device)
        notes = [] if checkpoint.note is None else [checkpoint.note]
        guidance = config.guidance if "scale" in config.guidance else None
        if guidance is not None and target_of(guidance).needs_null and not knows_null:
            guidance = None
            notes.append(f"{name} does not know the null condition, so the page has no guidance.")
        is_guided = guidance is not None and target_of(guidance).needs_null
        facts = Facts(checkpoint.class_names, knows_null, name, is_guided, config.negative_prompt)
        if target_of(config.sampler).name not in samplers:
            names = f"{target_of(config.sampler).name} does not fit diffusion={checkpoint.objective.name}"
            notes.append(f"sampler {names}, so the page begins with {next(iter(samplers))}.")
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        return cls(config, checkpoint, runtime, fields_for(conditions, facts), samplers, guidance, Streams())

    def views(self, form: Form) -> Iterator[View]:
        """Yield the grid as it is denoised and, last, as it is saved by `ditscale sample`.

        Raises ValueError for a form that cannot be sampled, before anything is.
        """
        order = self.order(form)
        return self.streams.views(lambda show: self._sample(order, show))

    def order(self, form: Form) -> Order:
        """Return the checked form. Raises ValueError, naming the field, for a value that it cannot have."""
        seed, count = whole_number("seed", form.seed), whole_number("number of images", form.num_images)
        if not 1 <= count <= GRID_IMAGES:
            raise ValueError(
                f"number of images is {count}, but the page shows from 1 to {GRID_IMAGES}; use "
                "`ditscale sample` for more."
            )
        sampler, guidance = self._sampler(form), self._guidance(form)
        asked = self.fields.asked(form.asked, count)
        config = replace(self.config, sampler=sampler, guidance=guidance)
        generator = replace(self.checkpoint, conditions=asked.source).generator(config, seed, self.runtime)
        words = [f"seed {seed}", generator.sampler.name, asked.words]
        words += [f"{sampler['steps']} steps"] if "steps" in sampler else []
        words += [f"guidance {guidance['scale']}"] if "scale" in guidance else []
        notes = asked.source.notes(asked.condition)
        return Order(generator, count, asked, "; ".join([", ".join(word for word in words if word), *notes]))

    def _sampler(self, form: Form) -> Section:
        """Return the section of the form's sampler with its steps."""
        if not isinstance(form.sampler, str) or form.sampler not in self.samplers:
            raise ValueError(
                f"There is no sampler {form.sampler!r} for this checkpoint{closest(str(form.sampler), self.samplers)} "
                f"There are {', '.join(self.samplers)}."
            )
        section = self.samplers[form.sampler]
        if "steps" not in section:
            return section
        is_text = isinstance(form.steps, str) and not form.steps.strip().isdecimal()  # ddim50, or a mistake
        changed = {**section, "steps": form.steps if is_text else whole_number("steps", form.steps)}
        check_parameters(changed, "sampler.")
        return changed

    def _guidance(self, form: Form) -> Section:
        """Return the section of the guidance with the form's scale. A scale of 1 is none, at half the cost."""
        scale = 1.0 if self.guidance is None else number("guidance scale", form.scale)
        if self.guidance is None or scale == 1:
            return sections_of("diffusion/guidance")["none"]
        return {**self.guidance, "scale": scale}

    def _sample(self, order: Order, show: Show[View]) -> None:
        """Show the grid of an order after every few calls of the network, and when it is done."""
        canvas = _Canvas(order, self.config.show_every, show)
        for indices, count in equal_rounds(order.num_images, self.config.batch_size, self.runtime):
            rows = indices[:count]  # what follows are repetitions
            condition = rows_of(order.asked.condition, indices)
            canvas.finish(rows, order.generator.images(indices, condition, canvas.watcher(rows)))


def _loaded(config: ServeSettings, runtime: Devices) -> LoadedCheckpoint:
    if is_foreign(config.checkpoint):
        # Whether its network can be guided is decided later, and it can be sampled without.
        return load_foreign(replace(config, guidance=sections_of("diffusion/guidance")["none"]), runtime)
    return LoadedCheckpoint.load(config.checkpoint, config.weights, runtime, config.text_encoder)


class _Canvas:
    """The images of an order: some are done, some are denoised, the others are blank."""

    def __init__(self, order: Order, show_every: int, show: Show[View]) -> None:
        self._order, self._show_every, self._show = order, show_every, show
        spec = order.generator.spec
        shape = (order.num_images, spec.image_size, spec.image_size, spec.channels)
        self._images = np.full(shape, _BLANK, np.uint8)
        self._columns = columns_of(order.num_images, order.asked.groups)
        self._captions = order.asked.source.texts(order.asked.condition)
        self._done = 0

    def watcher(self, rows: NDArray[np.int64]) -> Watcher:
        """Return the watcher of a sampler that denoises these images."""
        generator, total = self._order.generator, self._order.generator.sampler.calls()
        calls = itertools.count(1)

        def watch(x_0: Callable[[], Tensor]) -> None:
            call = next(calls)
            if call % self._show_every:
                return self._show(None)
            of_all = "" if total is None else f" of {total}"
            done = f"{self._finished()}, " if self._done else ""
            self._fill(rows, generator.preview(x_0()), f"{done}call {call}{of_all} of the network")

        return watch

    def finish(self, rows: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        """Show finished images."""
        self._done += len(rows)
        is_whole = self._done == self._order.num_images
        self._fill(rows, images, f"{self._done} images: {self._order.text}" if is_whole else self._finished())

    def _finished(self) -> str:
        return f"{self._done} of {self._order.num_images} images are done"

    def _fill(self, rows: NDArray[np.int64], images: NDArray[np.uint8], text: str) -> None:
        self._images[rows] = images[: len(rows)]
        self._show(View(grid_of(self._images, self._columns, self._captions), text))


def whole_number(name: str, value: Any) -> int:
    """Return the whole number that a field holds, as a number or text. Raises ValueError for other values."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = int(value)
        if found != value and not isinstance(value, str):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is {_shown(value)}, but it must be a whole number; change it.") from error
    return found


def number(name: str, value: Any) -> float:
    """Return the finite number that a field holds, as a number or text. Raises ValueError for other values."""
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {_shown(value)}, but it must be a number; change it.") from error
    if not math.isfinite(found):
        raise ValueError(f"{name} is {found}, but it must be finite; change it.")
    return found


def _shown(value: Any) -> str:
    return "empty" if value is None or value == "" else repr(value)[:100]
