"""Identify the autoencoder of latents: what their spec records of it, and tells apart."""

from typing import NamedTuple


class AutoencoderIdentity(NamedTuple):
    """The autoencoder that made latents, and how it scales them."""

    name: str
    revision: str
    downscale: int
    channels: int
    scale: float | list[float]
    shift: float | list[float]

    @property
    def weights(self) -> str:
        """Return name and revision."""
        return f"{self.name} {self.revision}"

    def __str__(self) -> str:
        return f"{self.weights} ({', '.join(map(str, self[2:]))})"
