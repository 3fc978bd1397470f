"""Make the conditions of samples on the host: class labels, or nothing.

A source makes conditions: trees of host tensors, of samples of the shards and of images that are to be generated. All
else passes them through unseen. Adding a kind of condition is a class here, an embedding in ``model/`` that reads it, a
YAML in ``conf/data/condition`` and a test.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.batch import Condition, mapped
from core.draws import Philox, Purpose


class ConditionSource(Protocol):
    """Make the conditions of one data set."""

    num_classes: int  # rows of the network's label table, without the null class; 0 where it has none

    def of_samples(self, labels: NDArray[np.int64]) -> Condition:
        """Return the condition of samples with these labels [B]."""
        ...

    def null(self, condition: Condition) -> Condition:
        """Return the dropped condition, of as many rows on the same device."""
        ...

    def in_turn(self, num_images: int, num_groups: int | None = None) -> Condition:
        """Return conditions for images that are to be generated: the first ``num_groups`` values in turn, or all."""
        ...

    def random(self, num_images: int, seed: int) -> Condition:
        """Return uniform conditions; image i's depends on (seed, i) alone."""
        ...

    def classes(self, condition: Condition) -> NDArray[np.int64] | None:
        """Return the class [B] that an image of each row should be recognised as, where the condition is one."""
        ...


class ClassLabels:
    """Integer labels [B] int64 in [0, num_classes); the null class has the number num_classes."""

    def __init__(self, num_classes: int) -> None:
        assert num_classes > 0, "data without classes have no labels"
        self.num_classes = num_classes

    def of_samples(self, labels: NDArray[np.int64]) -> Condition:
        """Return the labels themselves."""
        return {"label": torch.from_numpy(labels)}

    def null(self, condition: Condition) -> Condition:
        """Return the null class."""
        return {"label": torch.full_like(condition["label"], self.num_classes)}

    def in_turn(self, num_images: int, num_groups: int | None = None) -> Condition:
        """Return label i modulo the number of classes."""
        return {"label": torch.arange(num_images) % (num_groups or self.num_classes)}

    def random(self, num_images: int, seed: int) -> Condition:
        """Return uniform labels."""
        philox = Philox(seed)
        drawn = (philox.at(index, Purpose.SAMPLE_LABEL).integers(self.num_classes) for index in range(num_images))
        return self.of_samples(np.fromiter(drawn, dtype=np.int64, count=num_images))

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
        return self.of_samples(np.resize(np.array(labels, dtype=np.int64), num_images))

    def classes(self, condition: Condition) -> NDArray[np.int64] | None:
        """Return the labels."""
        labels: NDArray[np.int64] = condition["label"].numpy()
        return labels


class Unconditional:
    """No condition, whatever labels the data have. Takes what every source is built with."""

    num_classes = 0

    def __init__(self, num_classes: int = 0) -> None:
        pass

    def of_samples(self, labels: NDArray[np.int64]) -> Condition:
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

    def classes(self, condition: Condition) -> NDArray[np.int64] | None:
        """Return None: there is no class to recognise."""
        return None


def with_dropped(source: ConditionSource, condition: Condition, dropped: NDArray[np.bool_]) -> Condition:
    """Return a condition on the host with the null condition in the rows where ``dropped`` [B] says so."""
    null, rows = source.null(condition), torch.from_numpy(dropped)
    return {name: torch.where(_over(rows, value), null[name], value) for name, value in condition.items()}


def rows_of(condition: Condition, indices: NDArray[np.int64]) -> Condition:
    """Return some rows of a condition on the host."""
    chosen = torch.from_numpy(indices)
    return mapped(condition, lambda value: value[chosen])


def _over(rows: Tensor, value: Tensor) -> Tensor:
    """Return [B] as [B, 1, ...] with as many dimensions as the value."""
    return rows.view(-1, *[1] * (value.dim() - 1))
