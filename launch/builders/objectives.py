"""Fill in the settings of an objective that follow from the latents of the shards."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from data.manifest import Manifest
from diffusion.objective import LatentFacts
from launch.builders.components import target_of
from model.autoencoder import Autoencoder


def latent_facts(manifest: Manifest, autoencoder: Autoencoder) -> LatentFacts:
    """Return facts on the latents that ``autoencoder`` draws from shards, by the statistics in their manifest.

    Latents are affine in those of the shards, channel by channel: two images of one pixel, the mean and the mean plus
    one standard deviation, show how. All values together have the variance of the channels' means more than the mean
    of their variances.
    """
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (manifest.latent_mean, manifest.latent_std))
    means = torch.cat([mean, mean + std])
    drawn = autoencoder.draw(torch.cat([means, torch.zeros_like(means)], dim=1), torch.zeros_like(means)).double()
    variance = (drawn[1] - drawn[0]).square().mean() + drawn[0].var(correction=0)
    spec = manifest.spec
    rounded = float(f"{math.sqrt(variance.item()):.4g}")  # the same on every machine
    return LatentFacts(spec.channels * spec.latent_size**2, rounded)


def settled(section: Mapping[str, Any], latents: LatentFacts) -> dict[str, Any]:
    """Return an objective's section with the settings that follow from the latents filled in."""
    filled: dict[str, Any] = target_of(section).settled(section, latents)
    return filled
