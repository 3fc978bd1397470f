"""From a source's examples to moments: through an autoencoder, or as another program left them."""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.images import Preparation, UnreadableImageError, to_unit_range
from data.manifest import LatentSpec
from data.plan import latent_spec
from data.sources import Prepared, Source, prepared, require_label
from model.autoencoder import Autoencoder


class Encoding(Protocol):
    """What the encode job does with an example."""

    def spec(self, name: str, num_classes: int) -> LatentSpec:
        """What the latents mean."""
        ...

    def prepare(self, source: Source, index: int) -> Prepared:
        """On worker threads. Raises UnreadableImageError for an example to set aside, else ValueError."""
        ...

    def moments(self, items: NDArray[Any]) -> Tensor:
        """[B, ...] prepared -> [B, orientations, 2c, h, w] float32; on CUDA, not yet computed when this returns."""
        ...


class EncodeImages:
    """Decode, crop, and the autoencoder; each orientation is encoded on its own, after the crop.

    A convolutional encoder is not flip-equivariant: the latents of a mirrored image are not mirrored latents.
    """

    def __init__(self, autoencoder: Autoencoder, preparation: Preparation, flip: bool, device: torch.device) -> None:
        self._autoencoder = autoencoder.to(device)
        self._preparation, self._flip, self._device = preparation, flip, device

    def spec(self, name: str, num_classes: int) -> LatentSpec:
        """Raises ValueError where the image size does not fit the autoencoder."""
        return latent_spec(name, num_classes, self._autoencoder, self._preparation, self._flip)

    def prepare(self, source: Source, index: int) -> Prepared:
        """Read, decode, crop: [image_size, image_size, C] uint8, with as many channels as the autoencoder takes.

        Raises ValueError for an image in colour where it takes one channel.
        """
        item = prepared(source, index, self._preparation)
        if self._autoencoder.image_channels == 1 and item.values.shape[2] == 3:
            return item._replace(values=_as_grey(item.values, item.source_id, self._autoencoder.name))
        return item

    @torch.no_grad()
    def moments(self, items: NDArray[np.uint8]) -> Tensor:
        """[B, H, W, C] uint8 -> [B, orientations, 2c, h, w] float32."""
        pixels = to_unit_range(items, self._device)
        orientations = [pixels, pixels.flip(3)] if self._flip else [pixels]
        return torch.stack([self._autoencoder.moments(view) for view in orientations], dim=1)


def _as_grey(pixels: NDArray[np.uint8], source_id: str, autoencoder: str) -> NDArray[np.uint8]:
    """Return the one channel of [H, W, 3] whose channels are equal, as those of a decoded grey image are."""
    grey = pixels[:, :, :1]
    if (pixels != grey).any():
        raise ValueError(
            f"{source_id} is in colour, but the autoencoder {autoencoder} takes 1 channel; make the images grey, or "
            "choose model/autoencoder=identity data.autoencoder.channels=3."
        )
    return grey


class ImportLatents:
    """Latents of another program, as they are: [c, h, w] (no posterior left to draw from) or [2c, h, w] moments.

    ``scaled`` says that they were already scaled for the diffusion, as fast-DiT's are. Latents cannot be
    mirrored, so ``flip`` must be off. Raises ValueError where it is on.
    """

    log_variance = -30.0  # diffusers' lower clamp: a posterior without width

    def __init__(
        self, autoencoder: Autoencoder, preparation: Preparation, flip: bool, device: torch.device, scaled: bool = False
    ) -> None:
        if flip:
            raise ValueError(
                "data.flip is true, but imported latents have 1 orientation, and mirrored latents are not the latents "
                "of a mirrored image; set data.flip=false, or encode the images."
            )
        self._autoencoder, self._preparation, self._scaled = autoencoder, preparation, scaled

    def spec(self, name: str, num_classes: int) -> LatentSpec:
        """The spec of the autoencoder that made them."""
        return latent_spec(name, num_classes, self._autoencoder, self._preparation, flip=False)

    def prepare(self, source: Source, index: int) -> Prepared:
        """Moments [2c, h, w] float32. Raises ValueError for another shape."""
        source_id, content, label = source[index]
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
        return Prepared(source_id, self._moments(values, channels), label)

    def _moments(self, values: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
        """Mean and log-variance of the unscaled latent, [2c, h, w]."""
        mean, log_variance = values[:channels], values[channels:]
        if not len(log_variance):
            log_variance = np.full_like(mean, self.log_variance)
        if self._scaled:
            scale = np.asarray(self._autoencoder.scale, dtype=np.float32).reshape(-1, 1, 1)
            shift = np.asarray(self._autoencoder.shift, dtype=np.float32).reshape(-1, 1, 1)
            mean, log_variance = mean / scale + shift, log_variance - 2 * np.log(scale)
        return np.concatenate([mean, np.maximum(log_variance, self.log_variance)])

    def moments(self, items: NDArray[np.float32]) -> Tensor:
        """[B, 2c, h, w] -> [B, 1, 2c, h, w]."""
        return torch.from_numpy(items).unsqueeze(1)
