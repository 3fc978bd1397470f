"""Define the interface of image sources, the source of scikit-learn's digits, and the preparation of examples."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data.images import Crop, ExactSize, Preparation, UnreadableImageError
from data.unread import LeftOut

MAX_CAPTION = 2**14  # characters
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Example(NamedTuple):
    """One labeled image as it is stored."""

    source_id: str  # names the image within its source
    content: bytes | NDArray[Any]  # an encoded image; pixels [H, W, C] uint8; or a latent [c or 2c, h, w]
    label: int
    captions: tuple[str, ...] = ()  # several texts may describe one image


class Source(Protocol):
    """A finite, ordered collection of labeled images. Several threads may read it at once."""

    name: str
    class_names: list[str]
    fingerprint: str  # changes where an image, a label or their order changes
    block_sizes: Sequence[int] | None  # lengths of runs that are read together; None: images are read one by one
    left_out: Sequence[LeftOut]  # files among the images that give no example
    notes: Sequence[str]  # sentences for the user on what was found

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Return an example. Raises UnreadableImageError where this one image cannot be read."""
        ...


class DigitsSource:
    """scikit-learn's ``load_digits``: 1,797 scanned 8x8 digits with 17 gray levels, inside the package."""

    name = "digits"
    block_sizes = None
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = ()

    def __init__(self) -> None:
        self._images, self._labels, names = _digits()
        self.class_names = list(names)
        self.fingerprint = hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(f"digit-{index:04d}", self._images[index], int(self._labels[index]))


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """Return images [1797, 8, 8, 1], labels and names of the classes. The package's text file is parsed once."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis], digits.target
    for array in (images, labels):
        array.flags.writeable = False  # all sources share them
    return images, labels, tuple(str(name) for name in digits.target_names)


class Prepared(NamedTuple):
    """One labeled example as a network sees it."""

    source_id: str
    values: NDArray[Any]  # an image [image_size, image_size, C] uint8, or imported moments [2c, h, w] float32
    label: int
    captions: tuple[str, ...] = ()  # as `cleaned_captions` returns them


def require_label(source: Source, source_id: str, label: int) -> None:
    """Raise ValueError that names the image where the label is not one of the source's classes."""
    count = len(source.class_names)
    if not 0 <= label < count:
        rule = f"labels run from 0 to {count - 1}" if count else "name the classes, at least 1"
        raise ValueError(
            f"Image {source_id} of {source.name} has label {label}, but there are {count} classes; {rule}."
        )


def cleaned_captions(captions: Iterable[str], source_id: str) -> tuple[str, ...]:
    """Return captions without empty ones; white space and control characters are collapsed to single blanks.

    Raises UnreadableImageError where one has more than ``MAX_CAPTION`` characters or cannot be written in UTF-8.
    """
    cleaned = [" ".join(_CONTROL.sub(" ", caption).split()) for caption in captions]
    for caption in cleaned:
        if len(caption) > MAX_CAPTION:
            reason = f"a caption of it has {len(caption)} characters, but at most {MAX_CAPTION} are stored"
            raise UnreadableImageError(reason, source_id)
        try:
            caption.encode()
        except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can state
            raise UnreadableImageError("a caption of it has a character that UTF-8 does not have", source_id) from None
    return tuple(filter(None, cleaned))


def required_captions(captions: Iterable[str], source_id: str) -> tuple[str, ...]:
    """Return captions as `cleaned_captions` does. Raises UnreadableImageError where none is left."""
    if not (cleaned := cleaned_captions(captions, source_id)):
        raise UnreadableImageError("it has no caption", source_id)
    return cleaned


def require_nothing_left_out(source: Source, otherwise: str = "") -> None:
    """Raise ValueError that names an image which the source leaves out, for a caller that needs all images."""
    for entry in source.left_out:
        if entry.is_image:
            raise unwanted(source, entry.source_id, entry.reason, otherwise)


def unwanted(source: Source, source_id: str, reason: str, otherwise: str) -> ValueError:
    """Return the error for an unreadable image where all are needed; ``otherwise`` names another way out."""
    other = f", or {otherwise}" if otherwise else ""
    return ValueError(f"Image {source_id} of {source.name} cannot be read ({reason}); remove it{other}.")


def prepared(source: Source, index: int, preparation: Preparation) -> Prepared:
    """Read, decode and crop one image.

    Raises UnreadableImageError for an image to skip, and ValueError that names the image where its size or label is
    invalid.
    """
    source_id, content, label, captions = source[index]
    require_label(source, source_id, label)
    try:
        return Prepared(source_id, preparation(content), label, cleaned_captions(captions, source_id))
    except UnreadableImageError as error:
        raise UnreadableImageError(error.reason, source_id) from error
    except ValueError as error:
        raise ValueError(f"Image {source_id} of {source.name} {error}") from error


def load_images(
    source: Source, image_size: int, crop: Crop | None = None, apply_exif: bool = False, otherwise: str = ""
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the images [num_images, image_size, image_size, C] uint8 and labels [num_images] int64 of a small source.

    Without a ``crop``, images must already have the size. Raises ValueError for an image that cannot be read, or whose
    size or label is invalid; ``otherwise`` names another way out for an image that must stay.
    """
    require_nothing_left_out(source, otherwise)
    preparation = Preparation(image_size, crop or ExactSize(), apply_exif)
    try:
        examples = [prepared(source, index, preparation) for index in range(len(source))]
    except UnreadableImageError as error:
        raise unwanted(source, error.source_id, error.reason, otherwise) from error
    images = np.stack([example.values for example in examples])
    return images, np.array([example.label for example in examples], dtype=np.int64)
