"""The fields of the page that say what to sample: one class for each kind of condition.

A checkpoint's `ConditionSource` decides which. A new kind of condition needs a class here and a line in ``_FIELDS``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import gradio as gr

from core.batch import Condition
from data.conditions import ClassLabels, ConditionSource, Prompts, Unconditional
from data.low_resolution import LowResolution
from data.text_conditions import TextCondition, checked_prompts

IN_TURN = "all classes in turn"
NO_CLASS = "no class"
_SHOWN_PROMPTS, _SHOWN_LETTERS = 10, 60  # that the page begins with; of a prompt, in the sentence below the grid


class Facts(NamedTuple):
    """The facts on a checkpoint that fields need."""

    class_names: Sequence[str]  # in the order of the labels; empty where they are not known
    knows_null: bool  # whether the network was trained with the null condition
    name: str  # for sentences
    is_guided: bool = False  # whether the page has guidance by the null condition
    negative_prompt: str | None = None  # that the page begins with


class Asked(NamedTuple):
    """The condition that fields ask for."""

    source: ConditionSource  # with the null condition that guidance is away from
    condition: Condition  # of as many rows as there are images
    groups: int  # conditions that come in turn, a column of the grid each; 0: none
    words: str  # for people


class Fields(Protocol):
    """The fields of one kind of condition."""

    def components(self) -> list[Any]:
        """Return new components of Gradio, inside a page that is being built."""
        ...

    def asked(self, values: Sequence[Any], num_images: int) -> Asked:
        """Return the condition of images that the components' values ask for. Raises ValueError for other values."""
        ...


class NoFields:
    """No field: the network is not conditioned on anything that a user chooses."""

    def __init__(self, source: ConditionSource, facts: Facts) -> None:
        self._source = source

    def components(self) -> list[Any]:
        """Return nothing."""
        return []

    def asked(self, values: Sequence[Any], num_images: int) -> Asked:
        """Return the source's conditions in turn."""
        return Asked(self._source, self._source.in_turn(num_images), 0, "")


class ClassField:
    """One field: a class by its name, or by its number where there are no names, or all in turn."""

    def __init__(self, source: ConditionSource, facts: Facts) -> None:
        self._source, self._facts = source, facts
        numbers = range(source.num_classes)
        self._labels: dict[str, int | None] = {IN_TURN: None}
        if facts.knows_null:
            self._labels[NO_CLASS] = source.num_classes
        names = facts.class_names or [str(number) for number in numbers]
        # The first of several classes of one name, as for `ditscale sample`.
        self._labels |= dict(zip(reversed(names), reversed(numbers), strict=True))

    def components(self) -> list[Any]:
        """Return a list of the classes, into which a name can also be typed."""
        choices = [IN_TURN, *sorted(self._labels.keys() - {IN_TURN}, key=lambda name: self._labels[name] or 0)]
        # Other values are allowed so that it is this program that refuses them, naming the closest class.
        return [gr.Dropdown(choices, value=IN_TURN, label="class", allow_custom_value=True)]

    def asked(self, values: Sequence[Any], num_images: int) -> Asked:
        """Return the condition of the class, in every row. Raises ValueError where there is no such class."""
        (chosen,) = values
        label = self._labels.get(chosen, chosen) if isinstance(chosen, str) else chosen
        if chosen == IN_TURN and label is None:
            return Asked(self._source, self._source.in_turn(num_images), self._source.num_classes, IN_TURN)
        names, knows_null, where, *_ = self._facts
        condition = self._source.asked_for([label], num_images, names, knows_null, where)
        return Asked(self._source, condition, 0, chosen if chosen == NO_CLASS else f"class {chosen}")


class PromptFields:
    """A prompt in each line, in turn, and with guidance a negative one."""

    def __init__(self, source: TextCondition, facts: Facts) -> None:
        self._source, self._facts = source, facts
        self._length = source.encoder.spec().length  # the encoder is read here, once for all forms
        self._prompts = source.first_texts(_SHOWN_PROMPTS)

    def components(self) -> list[Any]:
        """Return a field of several lines, and one for the negative prompt where there is guidance."""
        prompts = [" ".join(text.split()) for text in self._prompts]
        info = f"one in each line, in turn, of up to {self._length} tokens"
        found = [gr.Textbox("\n".join(prompts), label="prompts", info=info, lines=3)]
        if self._facts.is_guided:
            negative = self._facts.negative_prompt or ""
            found.append(gr.Textbox(negative, label="negative prompt", info="guidance leads away from it"))
        return found

    def asked(self, values: Sequence[Any], num_images: int) -> Asked:
        """Return the prompts in turn. Raises ValueError where there is none, or a value is not a text."""
        prompts, negative = self._texts(*values)
        source = self._source.prompted(prompts, negative, self._facts.name)
        count = len(prompts.texts)
        words = f"{count} prompts in turn" if count > 1 else f"prompt {_short(prompts.texts[0])}"
        words += f", negative prompt {_short(negative)}" if negative else ""
        return Asked(source, source.in_turn(num_images), count if count > 1 else 0, words)

    def _texts(self, prompts: Any, negative: Any = "") -> tuple[Prompts, str]:
        for name, value in (("prompts", prompts), ("negative prompt", negative)):
            if not isinstance(value, str):
                raise ValueError(f"{name} is {'empty' if value is None else repr(value)[:100]}, but it must be a text.")
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise ValueError("prompts is empty; give at least one line.")
        checked_prompts([negative], None, "negative prompt")
        return checked_prompts(lines, None, "prompts"), negative.strip()


def _short(text: str) -> str:
    shown = text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."
    return f"'{shown}'"


def _labels_of(source: ConditionSource, facts: Facts) -> Fields:
    return (ClassField if source.num_classes else NoFields)(source, facts)


_FIELDS: dict[type, Callable[[Any, Facts], Fields]] = {
    ClassLabels: ClassField,
    Unconditional: NoFields,
    TextCondition: PromptFields,
    LowResolution: _labels_of,  # the images that are enlarged come from a file
}


def fields_for(source: ConditionSource, facts: Facts) -> Fields:
    """Return the fields of a source's kind, or of the closest one that it derives from.

    Raises ValueError where there are none.
    """
    for kind in type(source).__mro__:
        if kind in _FIELDS:
            return _FIELDS[kind](source, facts)
    raise ValueError(
        f"{facts.name} is conditioned by {type(source).__name__}, for which the page has no "
        "fields; use ditscale sample."
    )
