"""Normalize a job's latents by the statistics that its config or its shards state."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from data.manifest import Manifest
from data.settings import DataSettings
from launch.builders.saved_configs import as_now, setting_of
from model.autoencoder import Autoencoder
from model.normalized import NormalizedAutoencoder


class Normalization(Protocol):
    """The settings in ``data`` that decide how latents are normalized."""

    normalize: bool
    latent_mean: list[float] | None
    latent_std: list[float] | None


@dataclass
class SavedNormalization:
    """These settings in the config of a checkpoint."""

    normalize: bool
    latent_mean: list[float] | None
    latent_std: list[float] | None


def with_statistics(data: DataSettings, manifest: Manifest) -> DataSettings:
    """Return the settings with the statistics of the shards filled in, where latents are normalized by those."""
    if not data.normalize:
        return data
    mean, std = (data.latent_mean, data.latent_std)
    return replace(
        data,
        latent_mean=list(manifest.latent_mean) if mean is None else mean,
        latent_std=list(manifest.latent_std) if std is None else std,
    )


def normalized(autoencoder: Autoencoder, data: Normalization, said_by: str) -> Autoencoder:
    """Return the autoencoder of a network's latents. Raises ValueError, naming ``said_by``, without statistics."""
    if not data.normalize:
        if data.latent_mean is not None or data.latent_std is not None:
            raise ValueError(
                f"data.latent_mean or data.latent_std is given in {said_by}, but data.normalize is false; set "
                "data.normalize=true, or leave them out."
            )
        return autoencoder
    if data.latent_mean is None or data.latent_std is None:
        absent = "latent_mean" if data.latent_mean is None else "latent_std"
        raise ValueError(
            f"data.normalize is true in {said_by}, but there is no data.{absent}; give data.latent_mean and "
            "data.latent_std, one number per channel (manifest.json of the shards has them)."
        )
    return NormalizedAutoencoder(autoencoder, data.latent_mean, data.latent_std)


def saved_normalization(config: Mapping[str, Any], said_by: str) -> SavedNormalization:
    """Return the settings in the training config of a checkpoint. Raises ValueError for values of another type."""
    section = as_now(config).get("data")
    section = section if isinstance(section, Mapping) else {}
    values = {
        each.name: setting_of(section, DataSettings, each.name, f"data.{each.name}", said_by)
        for each in fields(SavedNormalization)
    }
    return SavedNormalization(**values)
