"""Read the real images of a reference: those of a source, or those that shards decode to."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from core.precision import exact_device
from data.images import Crop, ExactSize, Preparation, UnreadableImageError, to_uint8
from data.plan import identity_of
from data.shards import open_shards
from data.sources import Source, prepared, require_nothing_left_out, unwanted
from model.autoencoder import Autoencoder

_OF_SHARDS = "make the reference of the shards, where it is left out, by evaluation/image_set=shards"


class ImageSet(Protocol):
    """A finite, ordered collection of square images, read in batches."""

    name: str
    fingerprint: str  # changes if an image changes
    image_size: int
    num_classes: int

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> None:
        """Decode on ``device`` from now on, if a network decodes the images."""
        ...

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images [B, H, W, C] uint8 of the given rows [B]."""
        ...


class SourceImages:
    """All images of a `Source`, cropped as for encoding, read by ``threads`` threads.

    Raises ValueError for an image that cannot be read, since the statistics would be those of fewer images.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        crop: Crop | None = None,
        apply_exif: bool = False,
        threads: int = 8,
    ) -> None:
        require_nothing_left_out(source, _OF_SHARDS)
        self._source = source
        self._preparation = Preparation(image_size, crop or ExactSize(), apply_exif)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="reference")
        self.name, self.image_size, self.num_classes = source.name, image_size, len(source.class_names)
        content = f"{source.fingerprint} {image_size} {self._preparation.crop.name} {apply_exif}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def to(self, device: torch.device) -> None:
        """Do nothing: no network decodes these images."""

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images [B, H, W, C] uint8 of the given rows [B]."""
        return np.stack(list(self._threads.map(self._image, rows.tolist())))

    def _image(self, row: int) -> NDArray[np.uint8]:
        try:
            return prepared(self._source, row, self._preparation).values
        except UnreadableImageError as error:
            raise unwanted(self._source, error.source_id, error.reason, _OF_SHARDS) from error


class ShardImages:
    """Images that an autoencoder decodes from the posterior means in shards, which include its reconstruction error.

    A distance to these does not count that error, so it is not comparable with published numbers. Raises ValueError
    where another autoencoder made the shards.
    """

    def __init__(
        self, shards: str, autoencoder: Autoencoder, verify_checksums: bool, cache: str, cache_bytes: int
    ) -> None:
        self._shards, self._autoencoder = open_shards(shards, verify_checksums, cache, cache_bytes), autoencoder
        manifest, spec = self._shards.manifest, self._shards.manifest.spec
        theirs, ours = spec.made_by.weights, identity_of(autoencoder).weights
        if theirs != ours:
            raise ValueError(
                f"The shards in {shards} were made by the autoencoder {theirs}, but the config has "
                f"{ours}; choose the same data.autoencoder."
            )
        self._device = torch.device("cpu")
        self.name = f"{spec.source} decoded by {ours}"
        self.fingerprint = hashlib.sha256(f"{manifest.hash} decoded".encode()).hexdigest()
        self.image_size, self.num_classes = spec.image_size, spec.num_classes

    def __len__(self) -> int:
        return len(self._shards)

    def to(self, device: torch.device) -> None:
        """Use this device, or the CPU where the device does not compute true float32."""
        self._device = exact_device(device)
        self._autoencoder.to(self._device)

    @torch.no_grad()
    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images [B, H, W, C] uint8 of the given rows [B]."""
        moments = torch.from_numpy(self._shards.gather(rows, np.zeros(len(rows), dtype=bool))).to(self._device)
        mean = moments[:, : self._autoencoder.channels]
        latent = self._autoencoder.draw(moments, torch.zeros(mean.shape, device=self._device))
        return to_uint8(self._autoencoder.decode(latent))
