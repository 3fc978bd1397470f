"""webdataset tars of latents that another program encoded."""

import io

import numpy as np
from numpy.typing import NDArray

from data.images import UnreadableImageError
from data.tar_index import TarSamples


class LatentTars(TarSamples):
    """``KEY.npy`` ([c, h, w] latents, or [2c, h, w] moments) with ``KEY.cls``."""

    name = "latent tars"
    suffixes = (".npy", ".moments.npy", ".latent.npy")

    def decoded(self, content: bytes, source_id: str) -> NDArray[np.generic]:
        """The array. Raises UnreadableImageError where the bytes are none."""
        try:
            values: NDArray[np.generic] = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UnreadableImageError(f"{type(error).__name__}: {error}", source_id) from error
        return values
