"""Measure bits per dimension of a model over a data set."""

from typing import Any

import numpy as np
import torch

from core.batch import mapped
from core.draws import Philox, Purpose, draw_noise
from core.progress import ProgressBar
from data.shards import MappedShards
from diffusion.likelihood import bits_per_dimension
from diffusion.process import GaussianDiffusion, require_gaussian
from evaluation.generate import Generator, equal_rounds


@torch.no_grad()
def measure_likelihood(
    generator: Generator,
    shards: MappedShards,
    num_images: int,
    batch_size: int,
    network_precision: str,
    progress: ProgressBar,
) -> dict[str, Any]:
    """Return the variational bound, averaged over the first ``num_images`` samples, in the shards' fixed random order.

    Uses the generator's denoiser without its sampler. Every process must call it; each computes its share.
    """
    process = require_gaussian(generator.objective, "metric nll")
    count = min(num_images, len(shards))
    bits = [np.zeros(0)]
    with progress("likelihood", 0, count, "img") as bar:
        for rows, counted in equal_rounds(count, batch_size, generator.runtime):
            bits.append(_bits_of(generator, process, shards, rows)[:counted])
            bar.update(counted * generator.runtime.data_world)
    gathered = generator.runtime.gather(np.concatenate(bits))
    return {
        "bits_per_dimension": float(gathered.mean()),
        "likelihood_images": count,
        "likelihood_steps": process.num_steps,
        "likelihood_seed": generator.seed,
        "likelihood_precision": network_precision,
        "likelihood_data_hash": shards.manifest.hash,
    }


def _bits_of(generator: Generator, process: GaussianDiffusion, shards: MappedShards, rows: np.ndarray) -> np.ndarray:
    """Return the bits of each row, [B] float64; a sample's noise depends on (seed, row, step) alone."""
    philox, runtime = Philox(generator.seed), generator.runtime
    shape = (generator.spec.channels, generator.spec.latent_size, generator.spec.latent_size)

    def noise(draw: int) -> torch.Tensor:
        return runtime.put(torch.from_numpy(draw_noise(philox, rows, draw, shape, Purpose.LIKELIHOOD)))

    posterior = torch.from_numpy(draw_noise(philox, rows, 0, shape, Purpose.POSTERIOR))
    moments = torch.from_numpy(shards.gather(rows, np.zeros(len(rows), dtype=bool)))
    x_0 = runtime.put(generator.autoencoder.draw(moments, posterior))
    condition = mapped(generator.conditions.of_samples(shards.labels_of(rows)), runtime.put)
    with runtime.autocast():
        bits = bits_per_dimension(runtime.inference(generator.denoiser), process, x_0, condition, noise)
    return runtime.rows(bits).double().numpy()
