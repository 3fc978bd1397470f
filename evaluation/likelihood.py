"""Measure bits per dimension of a model over a data set."""

from typing import Any

import numpy as np
import torch

from core.batch import mapped
from core.draws import Philox, Purpose, draw_noise
from core.progress import ProgressBar
from data.conditions import Samples
from data.shards import MappedShards
from diffusion.continuous import ContinuousObjective
from diffusion.likelihood import bits_per_dimension, ode_bits_per_dimension
from diffusion.process import GaussianDiffusion, require_gaussian
from diffusion.samplers import Noise
from evaluation.generate import Generator, equal_rounds


@torch.no_grad()
def measure_likelihood(
    generator: Generator,
    shards: MappedShards,
    num_images: int,
    batch_size: int,
    ode_steps: int,
    network_precision: str,
    progress: ProgressBar,
) -> dict[str, Any]:
    """Return the likelihood, averaged over the first ``num_images`` samples, in the shards' fixed random order.

    It is the variational bound of a Gaussian process, and that by the ODE in ``ode_steps`` steps of an objective with a
    velocity. Uses the generator's denoiser without its sampler. Every process must call it; each computes its share.
    """
    count = min(num_images, len(shards))
    bits = [np.zeros(0)]
    with progress("likelihood", 0, count, "img") as bar:
        for rows, counted in equal_rounds(count, batch_size, generator.runtime):
            bits.append(_bits_of(generator, shards, rows, ode_steps)[:counted])
            bar.update(counted * generator.runtime.data_world)
    gathered = generator.runtime.gather(np.concatenate(bits))
    objective = generator.objective
    of_process = {"likelihood_steps": objective.num_steps} if isinstance(objective, GaussianDiffusion) else {}
    return {
        "bits_per_dimension": float(gathered.mean()),
        "likelihood_images": count,
        "likelihood_by": "bound" if of_process else "ode",
        "likelihood_steps": ode_steps,
        "likelihood_seed": generator.seed,
        "likelihood_precision": network_precision,
        "likelihood_data_hash": shards.manifest.hash,
        **of_process,
    }


def _bits_of(generator: Generator, shards: MappedShards, rows: np.ndarray, ode_steps: int) -> np.ndarray:
    """Return the bits of each row, [B] float64; a sample's noise depends on (seed, row, step) alone."""
    philox, runtime, objective = Philox(generator.seed), generator.runtime, generator.objective
    shape = (generator.spec.channels, generator.spec.latent_size, generator.spec.latent_size)

    def drawn(purpose: Purpose) -> Noise:
        return lambda draw: runtime.put(torch.from_numpy(draw_noise(philox, rows, draw, shape, purpose)))

    posterior = torch.from_numpy(draw_noise(philox, rows, 0, shape, Purpose.POSTERIOR))
    moments = torch.from_numpy(shards.gather(rows, np.zeros(len(rows), dtype=bool)))
    latents = generator.autoencoder.draw(moments, posterior)
    x_0, conditions = runtime.put(latents), generator.conditions
    of_rows = conditions.whole(conditions.of_samples(Samples(shards, rows)), shards, latents)
    condition = conditions.embedded(mapped(of_rows, runtime.put))
    with runtime.autocast():
        denoiser = runtime.inference(generator.denoiser)
        if isinstance(objective, ContinuousObjective):
            probes = drawn(Purpose.PROBE)
            bits = ode_bits_per_dimension(denoiser, objective, x_0, condition, probes, ode_steps)
        else:
            process = require_gaussian(objective, "metric nll")
            bits = bits_per_dimension(denoiser, process, x_0, condition, drawn(Purpose.LIKELIHOOD))
    return runtime.rows(bits).double().numpy()
