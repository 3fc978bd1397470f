"""Make the conditions of an upsampler: a low-resolution image beside the label."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Size, Tensor, nn

from core.batch import Condition
from core.npz import headers_of, read_array
from data.conditions import ClassLabels, ConditionSource, HostSource, Samples, Unconditional
from data.images import to_unit_range
from data.manifest import LatentSpec
from data.shards import MappedShards

LOW_RESOLUTION = "low_resolution"  # its name in a condition, [B, c, h / factor, w / factor]
_MOST_BYTES = 2**36


class LowResolution(HostSource):
    """A source of labels and low-resolution images: means over ``factor`` x ``factor`` latents of the sample itself.

    An image to generate has no sample, so `of_images` takes the images of another network.
    """

    def __init__(self, num_classes: int, factor: int) -> None:
        if factor < 2:
            raise ValueError(
                f"condition.factor is {factor}, but the low-resolution image must be smaller; set it to 2 or more."
            )
        self.factor = factor
        self._labels: ConditionSource = ClassLabels(num_classes) if num_classes else Unconditional()
        self.num_classes = num_classes

    def of_samples(self, samples: Samples) -> Condition:
        """Return the labels; the images are added by `whole`."""
        return self._labels.of_samples(samples)

    def whole(self, condition: Condition, shards: MappedShards, x_0: Tensor) -> Condition:
        """Return the labels and the means over squares of the latents x_0 [B, c, h, w], which are never dropped."""
        return {**condition, LOW_RESOLUTION: nn.functional.avg_pool2d(x_0, self.factor)}

    def seen(self, x_t: Tensor) -> dict[str, Size]:
        """Return the shapes of a label and of a low-resolution image."""
        _, channels, height, width = x_t.shape
        return {**self._labels.seen(x_t), LOW_RESOLUTION: Size((channels, height // self.factor, width // self.factor))}

    def of_images(self, images: NDArray[np.uint8]) -> Condition:
        """Return low-resolution images [B, H, W, C] uint8 as latents of pixel space."""
        return {LOW_RESOLUTION: to_unit_range(images)}

    def null(self, condition: Condition) -> Condition:
        """Return the null label with the same image, which guidance does not drop."""
        return {**condition, **self._labels.null(condition)}

    def in_turn(self, num_images: int, num_groups: int | None = None) -> Condition:
        """Return labels in turn, without images."""
        return self._labels.in_turn(num_images, num_groups)

    def random(self, num_images: int, seed: int) -> Condition:
        """Return uniformly drawn labels, without images."""
        return self._labels.random(num_images, seed)

    def asked_for(
        self, labels: Sequence[Any], num_images: int, class_names: Sequence[str], knows_null: bool, asked: str
    ) -> Condition:
        """Return the labels that a user asks for, without images."""
        return self._labels.asked_for(labels, num_images, class_names, knows_null, asked)

    def classes(self, condition: Condition) -> NDArray[np.int64] | None:
        """Return the labels."""
        return self._labels.classes(condition)


class GivenImages(NamedTuple):
    """Images that an upsampler enlarges, with their labels where the file has them."""

    images: NDArray[np.uint8]  # [N, H, W, C]
    labels: list[int] | None


class Enlarging(LowResolution):
    """A source that also gives the images to enlarge, in turn, with their labels where no others are asked for."""

    def __init__(self, source: LowResolution, given: GivenImages, knows_null: bool, where: str) -> None:
        super().__init__(source.num_classes, source.factor)
        self._given, self._knows_null, self._where = given, knows_null, where

    def in_turn(self, num_images: int, num_groups: int | None = None) -> Condition:
        """Return the images in turn, with their labels, or with labels in turn where they have none."""
        if self._given.labels is None or not self.num_classes:
            return {**super().in_turn(num_images, num_groups), **self._images(num_images)}
        return self.asked_for(self._given.labels, num_images, (), self._knows_null, self._where)

    def random(self, num_images: int, seed: int) -> Condition:
        """Return the images in turn, with their labels, or with random labels where they have none."""
        if self._given.labels is None or not self.num_classes:
            return {**super().random(num_images, seed), **self._images(num_images)}
        return self.in_turn(num_images)

    def asked_for(
        self, labels: Sequence[Any], num_images: int, class_names: Sequence[str], knows_null: bool, asked: str
    ) -> Condition:
        """Return the images in turn with the labels that a user asks for."""
        found = super().asked_for(labels, num_images, class_names, knows_null, asked)
        return {**found, **self._images(num_images)}

    def _images(self, num_images: int) -> Condition:
        return self.of_images(self._given.images[np.arange(num_images) % len(self._given.images)])


def enlarging(
    source: ConditionSource, file: str | None, spec: LatentSpec, knows_null: bool, of: str
) -> ConditionSource:
    """Return a checkpoint's source of conditions, with the images of a file where it is an upsampler's.

    ``of`` names the checkpoint. Raises ValueError for an upsampler without a file, a file without an upsampler, and as
    `read_low_resolution` does.
    """
    is_upsampler = isinstance(source, LowResolution)
    if is_upsampler != (file is not None):
        what = "an upsampler; give the images that it enlarges as" if is_upsampler else "not an upsampler; leave out"
        raise ValueError(f"{of} is {what} low_resolution=FILE.npz.")
    if file is None or not isinstance(source, LowResolution):
        return source
    return Enlarging(source, read_low_resolution(Path(file), spec, source.factor), knows_null, of)


def read_low_resolution(path: Path, spec: LatentSpec, factor: int) -> GivenImages:
    """Return the images of a file that `ditscale sample` wrote, for an upsampler of latents of this spec.

    Raises ValueError, naming the file, where its images do not have the size that is enlarged by ``factor``.
    """
    if spec.image_size != spec.latent_size:
        raise ValueError(
            f"low_resolution={path} has images, but the upsampler is of latents of side {spec.latent_size} for images "
            f"of {spec.image_size} px; only upsamplers of pixels can be sampled."
        )
    if not path.exists():
        raise ValueError(f"There is no file {path} with images to enlarge; give one that `ditscale sample` wrote.")
    arrays, side = headers_of(path), spec.latent_size // factor
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has no images arr_0; give a file that `ditscale sample` wrote.")
    images = read_array(path, "arr_0", _MOST_BYTES)
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, spec.channels) or len(images) == 0:
        raise ValueError(
            f"{path} has images {images.shape} of {images.dtype}, but the upsampler takes [N, {side}, {side}, "
            f"{spec.channels}] of uint8; give images of that size."
        )
    labels = read_array(path, "arr_1", _MOST_BYTES) if "arr_1" in arrays else None
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"{path} has {len(images)} images, but its labels arr_1 are {labels.shape} of {labels.dtype}; give a file "
            "with one whole number for each image, or without labels."
        )
    return GivenImages(images, None if labels is None else [int(label) for label in labels])
