"""Convert a source's examples to moments: encode images, or import the latents of another program."""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.images import Preparation, UnreadableImageError, to_unit_range
from data.manifest import LatentSpec, TeacherSpec
from data.plan import latent_spec
from data.sources import Prepared, Source, cleaned_captions, prepared, require_label
from data.teachers import Teacher
from model.autoencoder import Autoencoder


class Encoding(Protocol):
    """The conversion of examples to moments, and to a teacher's features, by the encode job."""

    teacher: TeacherSpec | None  # None where no features are stored

    def spec(self, name: str, num_classes: int) -> LatentSpec:
        """Return the description of the latents."""
        ...

    def prepare(self, source: Source, index: int) -> Prepared:
        """Read an example, on a worker thread.

        Raises UnreadableImageError for an example to skip, and ValueError for one that must stop the job.
        """
        ...

    def moments(self, items: NDArray[Any]) -> Tensor:
        """Return [B, orientations, 2c, h, w] float32 of prepared items [B, ...]; on CUDA, computed asynchronously."""
        ...

    def features(self, items: NDArray[Any]) -> Tensor:
        """Return the teacher's features [B, orientations, T, D] float16 of prepared items, computed likewise."""
        ...


class EncodeImages:
    """An encoding that decodes, crops and runs the autoencoder; each orientation is encoded separately, after the crop.

    A convolutional encoder is not flip-equivariant: the latent of a mirrored image is not the mirrored latent. Neither
    are the features of a ``teacher``, if one is given.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        preparation: Preparation,
        flip: bool,
        device: torch.device,
        teacher: Teacher | None = None,
    ) -> None:
        self._autoencoder, self._teacher = autoencoder.to(device), teacher
        self._preparation, self._flip, self._device = preparation, flip, device
        self.teacher = None if teacher is None else teacher.spec()
        if teacher is not None:
            teacher.to(device)

    def spec(self, name: str, num_classes: int) -> LatentSpec:
        """Return the description of the latents. Raises ValueError where the image size does not fit."""
        return latent_spec(name, num_classes, self._autoencoder, self._preparation, self._flip)

    def prepare(self, source: Source, index: int) -> Prepared:
        """Read, decode and crop an image: [image_size, image_size, C] uint8, with the autoencoder's channels.

        Raises ValueError for an image in color where the autoencoder takes one channel.
        """
        item = prepared(source, index, self._preparation)
        if self._autoencoder.image_channels == 1 and item.values.shape[2] == 3:
            return item._replace(values=_as_gray(item.values, item.source_id, self._autoencoder.name))
        return item

    @torch.no_grad()
    def moments(self, items: NDArray[np.uint8]) -> Tensor:
        """Return the moments [B, orientations, 2c, h, w] float32 of images [B, H, W, C] uint8."""
        return torch.stack([self._autoencoder.moments(view) for view in self._orientations(items)], dim=1)

    @torch.no_grad()
    def features(self, items: NDArray[np.uint8]) -> Tensor:
        """Return the teacher's features [B, orientations, T, D] float16 of images [B, H, W, C] uint8."""
        assert self._teacher is not None, "there is no teacher"
        return torch.stack([self._teacher.features(view).half() for view in self._orientations(items)], dim=1)

    def _orientations(self, items: NDArray[np.uint8]) -> list[Tensor]:
        pixels = to_unit_range(items, self._device)
        return [pixels, pixels.flip(3)] if self._flip else [pixels]


def _as_gray(pixels: NDArray[np.uint8], source_id: str, autoencoder: str) -> NDArray[np.uint8]:
    """Return [H, W, 1] of [H, W, 3]. Raises ValueError where the channels differ, so that the image is not gray."""
    gray = pixels[:, :, :1]
    if (pixels != gray).any():
        raise ValueError(
            f"{source_id} is in color, but the autoencoder {autoencoder} takes 1 channel; make the images gray, or "
            "choose model/autoencoder=identity data.autoencoder.channels=3."
        )
    return gray


class ImportLatents:
    """An encoding that imports latents of another program: [c, h, w] samples or [2c, h, w] moments.

    ``scaled`` says that they are already scaled for the diffusion, as fast-DiT's are. Latents cannot be mirrored.
    Raises ValueError where ``flip`` is on, or for a ``teacher``, which needs images.
    """

    teacher = None

    log_variance = -30.0  # diffusers' lower clamp, in effect zero variance; for latents without a posterior

    def __init__(
        self,
        autoencoder: Autoencoder,
        preparation: Preparation,
        flip: bool,
        device: torch.device,
        teacher: Teacher | None = None,
        scaled: bool = False,
    ) -> None:
        if teacher is not None:
            raise ValueError(
                "A teacher is given, but it sees images, and data/encoding=latents has none; set data/teacher=none, or "
                "encode the images."
            )
        if flip:
            raise ValueError(
                "data.flip is true, but imported latents have 1 orientation, and mirrored latents are not the latents "
                "of a mirrored image; set data.flip=false, or encode the images."
            )
        self._autoencoder, self._preparation, self._scaled = autoencoder, preparation, scaled

    def spec(self, name: str, num_classes: int) -> LatentSpec:
        """Return the description of the latents of the autoencoder that made them."""
        return latent_spec(name, num_classes, self._autoencoder, self._preparation, flip=False)

    def prepare(self, source: Source, index: int) -> Prepared:
        """Return moments [2c, h, w] float32. Raises ValueError for another shape."""
        source_id, content, label, captions = source[index]
        require_label(source, source_id, label)
        assert not isinstance(content, bytes), "a source of latents gives arrays"
        spec = self.spec(source.name, len(source.class_names))
        side, channels = spec.latent_size, spec.channels
        values = content.astype(np.float32)
        if values.shape not in ((channels, side, side), (2 * channels, side, side)):
            raise ValueError(
                f"{source_id} has shape {values.shape}, but the latents of {spec.autoencoder} at {spec.image_size} "
                f"pixels have {(channels, side, side)} or, with log-variances, {(2 * channels, side, side)}."
            )
        if not np.isfinite(values).all():
            raise UnreadableImageError("the latent has values that are not finite", source_id)
        return Prepared(source_id, self._moments(values, channels), label, cleaned_captions(captions, source_id))

    def _moments(self, values: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
        """Return mean and log-variance of the unscaled latent, [2c, h, w]."""
        mean, log_variance = values[:channels], values[channels:]
        if not len(log_variance):
            log_variance = np.full_like(mean, self.log_variance)
        if self._scaled:
            scale = np.asarray(self._autoencoder.scale, dtype=np.float32).reshape(-1, 1, 1)
            shift = np.asarray(self._autoencoder.shift, dtype=np.float32).reshape(-1, 1, 1)
            mean, log_variance = mean / scale + shift, log_variance - 2 * np.log(scale)
        return np.concatenate([mean, np.maximum(log_variance, self.log_variance)])

    def moments(self, items: NDArray[np.float32]) -> Tensor:
        """Return [B, 1, 2c, h, w] of [B, 2c, h, w]."""
        return torch.from_numpy(items).unsqueeze(1)

    def features(self, items: NDArray[np.float32]) -> Tensor:
        """Raise AssertionError: latents have no teacher."""
        raise AssertionError("latents have no teacher")
