"""Where images and labels come from."""

import hashlib
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Example(NamedTuple):
    """One labelled image."""

    source_id: str  # names the image within its source
    image: NDArray[np.uint8]  # [H, W, C]
    label: int


class Source(Protocol):
    """A finite, ordered collection of labelled images."""

    name: str
    class_names: list[str]
    fingerprint: str  # changes where an image, a label or their order changes

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class DigitsSource:
    """scikit-learn's ``load_digits``: 1,797 scanned 8x8 digits with 17 grey levels, inside the package."""

    name = "digits"

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
        self._labels = digits.target
        self.class_names = [str(name) for name in digits.target_names]
        self.fingerprint = hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(f"digit-{index:04d}", self._images[index], int(self._labels[index]))


def load_images(source: Source, image_size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Every image of a small source: [N, image_size, image_size, C] uint8 and its labels [N] int64.

    Raises ValueError as `checked_example` does.
    """
    examples = [checked_example(source, index, image_size) for index in range(len(source))]
    images = np.stack([example.image for example in examples])
    return images, np.array([example.label for example in examples], dtype=np.int64)


def checked_example(source: Source, index: int, image_size: int) -> Example:
    """An example whose size and label fit. Raises ValueError that names the image where they do not."""
    example = source[index]
    height, width = example.image.shape[:2]
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"Image {example.source_id} of {source.name} is {height}x{width}, but data.image_size is "
            f"{image_size}; set data.image_size={height}."
        )
    if not 0 <= example.label < len(source.class_names):
        raise ValueError(
            f"Image {example.source_id} of {source.name} has label {example.label}, but there are "
            f"{len(source.class_names)} classes; labels run from 0 to {len(source.class_names) - 1}."
        )
    return example
