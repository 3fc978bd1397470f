"""Count the images that an extractor which knows the data's classes recognizes as what was asked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.features.extractor import Features
from evaluation.metrics.statistics import Gather

MOST_PROMPTS = 100  # that are counted one by one
_LONGEST_PROMPT = 1000  # characters in a record


class Recognition:
    """The count of images that are recognized, in all and, of up to 100 prompts, by prompt.

    ``classes`` [num_images] are those asked for, None where there are none, ``texts`` the prompts, None where there are
    none. Of the prompts, those in ``held_out`` are no captions of the training data; None: that is unknown.
    """

    def __init__(
        self,
        classes: NDArray[np.int64] | None,
        texts: Sequence[str] | None,
        held_out: frozenset[str] | None,
    ) -> None:
        self._classes, self._held_out = classes, held_out
        self._prompts: list[tuple[str, int]] = []
        if classes is not None and texts is not None:
            prompts = list(dict.fromkeys(zip(texts, classes.tolist(), strict=True)))
            self._prompts = prompts if len(prompts) <= MOST_PROMPTS else []
        numbers = {prompt: number for number, prompt in enumerate(self._prompts)}
        self._groups = np.zeros(0 if classes is None else len(classes), np.int64)  # of the images
        if classes is not None and texts is not None and numbers:
            self._groups[:] = [numbers[prompt] for prompt in zip(texts, classes.tolist(), strict=True)]
        self._counts = np.zeros((max(1, len(self._prompts)), 2), np.int64)  # recognized, judged

    def add(self, indices: NDArray[np.int64], features: Features) -> None:
        """Count the images with these indices [B] and their features."""
        if self._classes is None or features.classes is None:
            return
        recognized = features.classes == self._classes[indices]
        np.add.at(self._counts, self._groups[indices], np.stack([recognized, np.ones_like(recognized)], axis=1))

    def merged(self, gather: Gather) -> dict[str, Any]:
        """Return ``recognized_fraction`` over all processes, None where the extractor does not know the classes.

        With prompts, ``recognized_by_prompt`` has a count for each, in the order of the images.
        """
        counts = gather(self._counts).reshape(-1, *self._counts.shape).sum(axis=0)
        recognized, judged = counts.sum(axis=0).tolist()
        found: dict[str, Any] = {"recognized_fraction": recognized / judged if judged else None}
        if judged and self._prompts:
            found["recognized_by_prompt"] = [
                {
                    "prompt": _printable(text),
                    "label": number,
                    "images": of_prompt[1],
                    "recognized": of_prompt[0],
                    "held_out": None if self._held_out is None else text in self._held_out,
                }
                for (text, number), of_prompt in zip(self._prompts, counts.tolist(), strict=True)
            ]
        return found


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:_LONGEST_PROMPT]
