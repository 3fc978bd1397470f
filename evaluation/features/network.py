"""Compute features with a network that takes normalized images, the base of TorchScript and DINOv2 features."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from core.precision import exact_device, exact_float32
from core.records import canonical_hash
from evaluation.features.extractor import Features


class NetworkFeatures:
    """A `FeatureExtractor` with ``network``, which maps [B, 3, ``image_size``, ``image_size``] to [B, D], float32.

    Images in [0, 1] are resized bicubically with antialiasing and normalized as (image - mean) / std per channel.
    ``hash`` depends on ``weights_hash`` and on these three settings, since all of them determine the features.
    ``place`` names the network's file or folder in errors. Raises ValueError unless ``mean`` and ``std`` have 3 values.
    """

    def __init__(
        self,
        network: nn.Module,
        title: str,
        weights_hash: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        place: str,
    ) -> None:
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(
                f"evaluation.features has {len(mean)} numbers in mean and {len(std)} in std, but needs 3 in each, one "
                "a channel; repeat one number for gray images."
            )
        self._network, self.title, self._place = network.eval(), title, place
        identity = [weights_hash, image_size, [float(value) for value in mean], [float(value) for value in std]]
        self.hash = canonical_hash(identity, spaced=True)
        self.facts: dict[str, float] = {}
        self._image_size, self._batch_size = image_size, batch_size
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Use this device, or the CPU where the device does not compute true float32."""
        self._device = device = exact_device(device)
        self._network.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Map images [B, H, W, C] uint8, C 1 or 3, to [B, D] float32. Raises ValueError for other shapes."""
        if images.shape[3] not in (1, 3):
            raise ValueError(
                f"The images have {images.shape[3]} channels, but the network of {self.title} sees 3 (or 1, as gray); "
                "choose another evaluation/features."
            )
        with exact_float32(self._device):
            parts = [
                self._vectors(images[start : start + self._batch_size])
                for start in range(0, len(images), self._batch_size)
            ]
        return Features(torch.cat(parts).numpy())

    def _vectors(self, images: NDArray[np.uint8]) -> Tensor:
        """Return the features [B, D] of a batch on the CPU. Raises ValueError where the network returns others."""
        pixels = self._prepared(images)
        try:
            found = self._network(pixels)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            *_, reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"The network in {self._place} fails on images {list(pixels.shape)} ({reason}); use one that maps "
                "such images to [B, D]."
            ) from error
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
            what = f"{tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(
                f"The network of {self.title} gives {what}, but features are [B, D], here of {len(images)} images; "
                f"it is from {self._place}."
            )
        if not found.is_floating_point():
            raise ValueError(f"The network in {self._place} gives {found.dtype}, but features are floating-point.")
        return found.float().cpu()

    def _prepared(self, images: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1) / 255
        size = (self._image_size, self._image_size)
        resized = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        return (resized.clamp(0, 1) - self._mean) / self._std
