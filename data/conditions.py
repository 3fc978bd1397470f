"""Make the conditions of samples on the host: class labels, or nothing.

A condition source makes conditions (trees of host tensors) for samples of the shards and for images to generate. All
other code passes them through without looking inside. A new kind of condition needs a class here, an embedding in
``model/`` that reads it, a YAML in ``conf/data/condition`` and a test.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Size, Tensor, nn

from core.batch import Condition, mapped
from core.closest import closest
from core.draws import Philox, Purpose, Streams, draw_uniform
from data.shards import MappedShards
from data.text_encoders import TextEncoder

Place = Callable[[nn.Module], nn.Module]  # moves a frozen network to the devices


class Samples(NamedTuple):
    """Samples of shards, with the random numbers of their visits."""

    shards: MappedShards
    rows: NDArray[np.int64]  # [B]
    positions: NDArray[np.int64] | None = None  # [B], in the order of training
    streams: Streams | None = None  # None: nothing is drawn

    @property
    def labels(self) -> NDArray[np.int64]:
        """Return the labels [B]."""
        return self.shards.labels_of(self.rows)

    def uniform(self, purpose: Purpose) -> NDArray[np.float64]:
        """Return a number in [0, 1) for each visit [B], or zeros where nothing is drawn."""
        if self.streams is None or self.positions is None:
            return np.zeros(len(self.rows))
        return draw_uniform(self.streams, self.positions, purpose)


class Prompts(NamedTuple):
    """Texts to generate images of."""

    texts: tuple[str, ...]
    classes: tuple[int, ...] | None = None  # the class that each one's images should be recognized as


class ConditionSource(Protocol):
    """A maker of the conditions of one data set."""

    num_classes: int  # rows of the network's label table, without the null class; 0 where it has none
    may_be_unread: frozenset[str]  # parts that a network may leave out
    held_out: frozenset[str] | None  # texts to generate that no caption of the training data equals; None: not known

    @property
    def num_groups(self) -> int:
        """Return how many conditions come in turn; 0 where there is only one."""
        ...

    def prepare(self, place: Place, text_encoder: Callable[[], TextEncoder] | None) -> None:
        """Give the source what it needs on devices: how to place frozen networks, and how to read a text encoder."""
        ...

    def announce(self, shards: MappedShards) -> None:
        """Tell the shards what training reads of them beside latents. Raises ValueError where they do not have it."""
        ...

    def of_samples(self, samples: Samples) -> Condition:
        """Return the condition of samples, without the parts that `whole` adds."""
        ...

    def whole(self, condition: Condition, shards: MappedShards, x_0: Tensor) -> Condition:
        """Return the whole condition of a batch with latents x_0 [B, c, h, w], dropped where ``condition`` was.

        It adds what follows from the latents, and what is too large to be read for many batches ahead.
        """
        ...

    def embedded(self, condition: Condition) -> Condition:
        """Return a condition on the devices as the network gets it, through the source's frozen networks."""
        ...

    def seen(self, x_t: Tensor) -> dict[str, Size]:
        """Return the shapes, without B, of the parts that a network of latents x_t [B, c, h, w] gets."""
        ...

    def null(self, condition: Condition) -> Condition:
        """Return the null condition, with the same parts, as many rows and on the same device."""
        ...

    def in_turn(self, num_images: int, num_groups: int | None = None) -> Condition:
        """Return conditions for images to generate, cycling through the first ``num_groups`` values, or through all."""
        ...

    def random(self, num_images: int, seed: int) -> Condition:
        """Return uniformly drawn conditions; that of image i depends on (seed, i) only."""
        ...

    def asked_for(
        self, labels: Sequence[Any], num_images: int, class_names: Sequence[str], knows_null: bool, asked: str
    ) -> Condition:
        """Return the conditions that a user asks for in a list, which is repeated to ``num_images``.

        ``class_names`` are those of the network's data, empty if unknown; ``knows_null`` says whether the network was
        trained with the null condition; ``asked`` is the checkpoint's path. Raises ValueError for anything that the
        network does not know.
        """
        ...

    def prompted(self, prompts: Prompts | None, negative: str | None, asked: str) -> "ConditionSource":
        """Return a source of these texts in place of its own, guided away from a negative one; None leaves it as it is.

        ``asked`` is the checkpoint's path. Raises ValueError where the network is not conditioned on texts.
        """
        ...

    def classes(self, condition: Condition) -> NDArray[np.int64] | None:
        """Return the class [B] that each row's image should be recognized as, or None without classes."""
        ...

    def texts(self, condition: Condition) -> list[str] | None:
        """Return the text of each row of a condition of images to generate, or None without texts."""
        ...

    def notes(self, condition: Condition) -> list[str]:
        """Return sentences for the user who asked for a condition of images to generate."""
        ...


class HostSource:
    """The common part of sources whose conditions are whole as the host makes them, and are not texts."""

    num_classes = 0
    may_be_unread: frozenset[str] = frozenset()
    held_out: frozenset[str] | None = None

    @property
    def num_groups(self) -> int:
        """Return the number of classes."""
        return self.num_classes

    def prepare(self, place: Place, text_encoder: Callable[[], TextEncoder] | None) -> None:
        """Do nothing: the source has no network."""

    def announce(self, shards: MappedShards) -> None:
        """Do nothing: labels are read with the index."""

    def whole(self, condition: Condition, shards: MappedShards, x_0: Tensor) -> Condition:
        """Return the condition."""
        return condition

    def embedded(self, condition: Condition) -> Condition:
        """Return the condition."""
        return condition

    def in_turn(self, num_images: int, num_groups: int | None = None) -> Condition:
        """Return conditions in turn."""
        raise NotImplementedError

    def seen(self, x_t: Tensor) -> dict[str, Size]:
        """Return the shapes of the parts that conditions in turn have."""
        return {name: value.shape[1:] for name, value in self.in_turn(1).items()}

    def prompted(self, prompts: Prompts | None, negative: str | None, asked: str) -> "ConditionSource":
        """Return the source itself. Raises ValueError for texts."""
        if prompts is not None or negative is not None:
            given = "prompts is given" if prompts is not None else "negative_prompt is given"
            on = (
                f"{self.num_classes} classes; give labels in its place" if self.num_classes else "nothing; leave it out"
            )
            raise ValueError(f"{given}, but {asked} is conditioned on {on}.")
        return self  # type: ignore[return-value]  # the classes that derive from this one are sources

    def texts(self, condition: Condition) -> None:
        """Return None: there is no text."""

    def notes(self, condition: Condition) -> list[str]:
        """Return nothing: conditions are taken as they are given."""
        return []


class ClassLabels(HostSource):
    """A source of integer labels [B] int64 in [0, num_classes); the null class has the number num_classes."""

    def __init__(self, num_classes: int) -> None:
        assert num_classes > 0, "data without classes have no labels"
        self.num_classes = num_classes

    def of_samples(self, samples: Samples) -> Condition:
        """Return the labels."""
        return self.of_labels(samples.labels)

    def of_labels(self, labels: NDArray[np.int64]) -> Condition:
        """Return the labels [B] as a condition."""
        return {"label": torch.from_numpy(labels)}

    def null(self, condition: Condition) -> Condition:
        """Return the null class."""
        return {"label": torch.full_like(condition["label"], self.num_classes)}

    def in_turn(self, num_images: int, num_groups: int | None = None) -> Condition:
        """Return label i modulo the number of classes."""
        return {"label": torch.arange(num_images) % (num_groups or self.num_classes)}

    def random(self, num_images: int, seed: int) -> Condition:
        """Return uniformly drawn labels."""
        philox = Philox(seed)
        drawn = (philox.at(index, Purpose.SAMPLE_LABEL).integers(self.num_classes) for index in range(num_images))
        return self.of_labels(np.fromiter(drawn, dtype=np.int64, count=num_images))

    def given(self, labels: Sequence[int], num_images: int) -> Condition:
        """Return the given labels repeated to ``num_images``.

        Raises ValueError for a label outside [0, num_classes]. ``num_classes`` itself is the null class: an
        unconditional sample.
        """
        if not labels:
            raise ValueError(
                f"labels is empty; give classes from 0 to {self.num_classes - 1}, or leave it out for all of them."
            )
        for label in labels:
            if not 0 <= label <= self.num_classes:
                raise ValueError(
                    f"labels has {label}, but this model knows the classes 0 to {self.num_classes - 1}, and "
                    f"{self.num_classes} for none; choose among these."
                )
        return self.of_labels(np.resize(np.array(labels, dtype=np.int64), num_images))

    def asked_for(
        self, labels: Sequence[Any], num_images: int, class_names: Sequence[str], knows_null: bool, asked: str
    ) -> Condition:
        """Return the labels, which are given by number or by name."""
        numbers = [_class_number(label, class_names) for label in labels]
        if not knows_null and self.num_classes in numbers:
            raise ValueError(
                f"labels has {self.num_classes}, the null class, but {asked} was trained without label dropout and has "
                f"none; choose classes from 0 to {self.num_classes - 1}."
            )
        return self.given(numbers, num_images)

    def classes(self, condition: Condition) -> NDArray[np.int64] | None:
        """Return the labels."""
        labels: NDArray[np.int64] = condition["label"].numpy()
        return labels


class Unconditional(HostSource):
    """A source of empty conditions, whatever labels the data have. It accepts the arguments of every source."""

    def __init__(self, num_classes: int = 0) -> None:
        pass

    def of_samples(self, samples: Samples) -> Condition:
        """Return nothing."""
        return {}

    def null(self, condition: Condition) -> Condition:
        """Return nothing."""
        return {}

    def in_turn(self, num_images: int, num_groups: int | None = None) -> Condition:
        """Return nothing."""
        return {}

    def random(self, num_images: int, seed: int) -> Condition:
        """Return nothing."""
        return {}

    def asked_for(
        self, labels: Sequence[Any], num_images: int, class_names: Sequence[str], knows_null: bool, asked: str
    ) -> Condition:
        """Raise ValueError: there is nothing to ask for."""
        raise ValueError(f"labels is given, but {asked} was trained without classes; leave it out.")

    def classes(self, condition: Condition) -> NDArray[np.int64] | None:
        """Return None: there is no class to recognize."""
        return None


def _class_number(label: Any, class_names: Sequence[str]) -> int:
    """Return the number of a class given by its name, which takes precedence, or its number.

    Raises ValueError with the closest name where there is none of this name.
    """
    if isinstance(label, str) and label in class_names:
        return class_names.index(label)
    if isinstance(label, int) and not isinstance(label, bool):
        return label
    if isinstance(label, str) and label.isdecimal():
        return int(label)
    if not class_names:
        raise ValueError(f"labels has {label!r}, but this checkpoint has no names of classes; give their numbers.")
    raise ValueError(
        f"labels has {label!r}, but there is no such class{closest(str(label), class_names)} There are "
        f"{len(class_names)}, from {class_names[0]!r} to {class_names[-1]!r}."
    )


def with_dropped(source: ConditionSource, condition: Condition, dropped: NDArray[np.bool_]) -> Condition:
    """Return a condition on the host with the null condition in the rows where ``dropped`` [B] is true."""
    null, rows = source.null(condition), torch.from_numpy(dropped)
    return {name: torch.where(_over(rows, value), null[name], value) for name, value in condition.items()}


def rows_of(condition: Condition, indices: NDArray[np.int64]) -> Condition:
    """Return some rows of a condition on the host."""
    chosen = torch.from_numpy(indices)
    return mapped(condition, lambda value: value[chosen])


def _over(rows: Tensor, value: Tensor) -> Tensor:
    """Return [B] reshaped to [B, 1, ...], with as many dimensions as the value."""
    return rows.view(-1, *[1] * (value.dim() - 1))
