"""Bits per dimension of a model over a data set."""

from typing import Any

import numpy as np
import torch

from data.progress import ProgressBar
from data.shards import MappedShards
from diffusion.draws import Philox, Purpose, draw_noise
from diffusion.likelihood import bits_per_dimension
from evaluation.generate import Generator


@torch.no_grad()
def measure_likelihood(
    generator: Generator, shards: MappedShards, num_images: int, batch_size: int, progress: ProgressBar
) -> dict[str, Any]:
    """The bound over the first ``num_images`` samples of the shards (they are in a fixed random order).

    Takes the generator's denoiser without its sampler. Every process must call it; each takes its share.
    """
    count = min(num_images, len(shards))
    mine = np.array_split(np.arange(count), generator.runtime.data_world)[generator.runtime.data_rank]
    bits = [np.zeros(0)]
    with progress("likelihood", 0, count, "img") as bar:
        for start in range(0, len(mine), batch_size):
            rows = mine[start : start + batch_size]
            bits.append(_bits_of(generator, shards, rows))
            bar.update(len(rows) * generator.runtime.data_world)
    gathered = generator.runtime.gather(np.concatenate(bits))
    return {
        "bits_per_dimension": float(gathered.mean()),
        "likelihood_images": count,
        "likelihood_steps": generator.process.num_steps,
        "likelihood_seed": generator.seed,
    }


def _bits_of(generator: Generator, shards: MappedShards, rows: np.ndarray) -> np.ndarray:
    """[len(rows)] float64; a sample's noise depends on (seed, row, step) alone."""
    philox, device = Philox(generator.seed), generator.runtime.device
    shape = (generator.spec.channels, generator.spec.latent_size, generator.spec.latent_size)

    def noise(draw: int) -> torch.Tensor:
        return torch.from_numpy(draw_noise(philox, rows, draw, shape, Purpose.LIKELIHOOD)).to(device)

    posterior = torch.from_numpy(draw_noise(philox, rows, 0, shape, Purpose.POSTERIOR))
    moments = torch.from_numpy(shards.gather(rows, np.zeros(len(rows), dtype=bool)))
    x_0 = generator.autoencoder.draw(moments, posterior).to(device)
    label = torch.from_numpy(shards.labels[rows]).to(device)
    with generator.runtime.autocast():
        bits = bits_per_dimension(generator.denoiser, generator.process, x_0, label, noise)
    return bits.double().cpu().numpy()
