"""Position in, batch out: what the training loop eats."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.order import positions_of_step, rows_at
from data.shards import MappedShards
from diffusion.batch import Batch
from diffusion.draws import Draws, Philox, training_draws
from model.autoencoder import Autoencoder


class TrainingBatches:
    """Batches as a pure function of (seed, step); ``rank`` of ``world`` reads its slice of each.

    Raises ValueError where the batch does not divide by the processes.
    """

    def __init__(
        self,
        shards: MappedShards,
        autoencoder: Autoencoder,
        *,
        seed: int,
        batch_size: int,
        num_timesteps: int,
        class_dropout: float,
        flip: bool,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        positions_of_step(0, batch_size, rank, world)  # refuses a batch that does not divide
        self.shards = shards
        self.autoencoder = autoencoder
        self.seed = seed
        self.batch_size = batch_size
        self.num_timesteps = num_timesteps
        self.class_dropout = class_dropout
        self.flip = flip
        self.rank = rank
        self.world = world
        self._philox = Philox(seed)

    def from_step(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Batches of the steps first_step .. last_step - 1; the step number is all there is to resume."""
        for step in range(first_step, last_step):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        """This process's batch of one step."""
        spec = self.shards.manifest.spec
        shape = (spec.channels, spec.latent_size, spec.latent_size)
        positions = positions_of_step(step, self.batch_size, self.rank, self.world)
        rows = rows_at(self.seed, positions, len(self.shards))
        draws = [
            training_draws(self._philox, int(position), shape, self.num_timesteps, self.class_dropout, self.flip)
            for position in positions
        ]
        moments = self.shards.gather(rows, np.array([draw.flip for draw in draws]))
        posterior = torch.from_numpy(np.stack([draw.posterior for draw in draws]))
        return Batch(
            latent=self.autoencoder.draw(torch.from_numpy(moments), posterior),
            label=self._labels(rows, draws),
            t=torch.tensor([draw.t for draw in draws]),
            noise=torch.from_numpy(np.stack([draw.noise for draw in draws])),
        )

    def _labels(self, rows: np.ndarray, draws: list[Draws]) -> Tensor:
        """Labels with the null class num_classes where they were dropped."""
        dropped = np.array([draw.drop_label for draw in draws])
        null_class = self.shards.manifest.spec.num_classes
        return torch.from_numpy(np.where(dropped, null_class, self.shards.labels[rows]))
