"""Define the source of webdataset tars of latents that another program encoded."""

import io

import numpy as np
from numpy.typing import NDArray

from data.images import UnreadableImageError
from data.tar_index import TarSamples
from data.unread import LFS_REASON, is_lfs_pointer


class LatentTars(TarSamples):
    """A source of samples ``KEY.npy`` ([c, h, w] latents or [2c, h, w] moments) with ``KEY.cls``."""

    name = "latent tars"
    suffixes = (".npy", ".moments.npy", ".latent.npy")

    def decoded(self, content: bytes, source_id: str) -> NDArray[np.generic]:
        """Return the array. Raises UnreadableImageError where the bytes are not an array."""
        if is_lfs_pointer(content):
            raise UnreadableImageError(f"the file {LFS_REASON}", source_id)
        try:
            values = np.load(io.BytesIO(content), allow_pickle=False)
        except Exception as error:  # numpy's parser of headers raises ValueError, TokenError, MemoryError and more
            raise UnreadableImageError(f"{type(error).__name__}: {error}".replace("\n", " "), source_id) from error
        if not isinstance(values, np.ndarray):
            raise UnreadableImageError("it is a collection of arrays, not a single one", source_id)
        return values
