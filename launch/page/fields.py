"""The fields of the page that say what to sample: one class for each kind of condition.

A checkpoint's `ConditionSource` decides which. A new kind of condition needs a class here and a line in ``_FIELDS``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import gradio as gr

from core.batch import Condition
from data.conditions import ClassLabels, ConditionSource, Unconditional
from data.low_resolution import LowResolution

IN_TURN = "all classes in turn"
NO_CLASS = "no class"


class Facts(NamedTuple):
    """The facts on a checkpoint that fields need."""

    class_names: Sequence[str]  # in the order of the labels; empty where they are not known
    knows_null: bool  # whether the network was trained with the null condition
    name: str  # for sentences


class Asked(NamedTuple):
    """The condition that fields ask for."""

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
        return Asked(self._source.in_turn(num_images), 0, "")


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
            return Asked(self._source.in_turn(num_images), self._source.num_classes, IN_TURN)
        return Asked(
            self._source.asked_for([label], num_images, *self._facts),
            0,
            chosen if chosen == NO_CLASS else f"class {chosen}",
        )


def _labels_of(source: ConditionSource, facts: Facts) -> Fields:
    return (ClassField if source.num_classes else NoFields)(source, facts)


_FIELDS: dict[type, Callable[[Any, Facts], Fields]] = {
    ClassLabels: ClassField,
    Unconditional: NoFields,
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
