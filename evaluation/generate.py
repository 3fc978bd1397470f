"""Generate images with a denoiser; image i depends on (seed, i) and its condition alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.batch import Condition, mapped
from core.draws import Philox, Purpose, draw_noise
from data.conditions import ConditionSource, rows_of
from data.images import to_uint8
from data.manifest import LatentSpec
from diffusion.guidance import Cost, Guided
from diffusion.objective import Objective
from diffusion.samplers import Sampler
from diffusion.watching import Watched, Watcher
from model.autoencoder import Autoencoder
from model.flops import cost_of_call
from runtime.protocol import Devices

DECODED_AT_ONCE = 32  # images: an autoencoder needs far more memory for an image than a sampler does


@dataclass(frozen=True)
class Generator:
    """Generates images from their indices and conditions."""

    denoiser: Guided
    objective: Objective
    autoencoder: Autoencoder
    sampler: Sampler
    spec: LatentSpec
    conditions: ConditionSource
    seed: int
    runtime: Devices
    cost_of: Cost = cost_of_call  # multiply-adds of one call of a network for one image

    def cost(self) -> int | None:
        """Return the multiply-adds of one image, without its decoding, or None where the sampler cannot tell yet."""
        calls = self.sampler.calls()
        return None if calls is None else calls * self.denoiser.cost(self.cost_of)

    @torch.no_grad()
    def images(
        self, indices: NDArray[np.int64], condition: Condition, watcher: Watcher | None = None
    ) -> NDArray[np.uint8]:
        """Return images [B, H, W, C] uint8 of the given indices [B] and their condition, on the CPU.

        B is a multiple of the number of the process's devices. Every process must call it, with the same B. A
        ``watcher`` is called after each call of the network, and changes no image.
        """
        decoded = self._decoded(self._latents(indices, condition, watcher))
        _require_finite(decoded, indices, self.runtime)
        return to_uint8(decoded)

    @torch.no_grad()
    def preview(self, x_0: torch.Tensor) -> NDArray[np.uint8]:
        """Return images [B, H, W, C] uint8 of latents [B, c, h, w] that may not be finite, as early predictions."""
        return to_uint8(self._decoded(x_0).nan_to_num())

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the images [B, C, H, W] of latents on the device, on the CPU."""
        parts = self.runtime.parts(latents, DECODED_AT_ONCE)
        return torch.cat([self.runtime.rows(self.autoencoder.decode(part)) for part in parts])

    def _latents(
        self, indices: NDArray[np.int64], condition: Condition, watcher: Watcher | None = None
    ) -> torch.Tensor:
        """Return samples [B, c, h, w] on the device, without a device read but those of a watcher."""
        philox, runtime = Philox(self.seed), self.runtime
        shape = (self.spec.channels, self.spec.latent_size, self.spec.latent_size)

        def noise(draw: int) -> torch.Tensor:
            return runtime.put(torch.from_numpy(draw_noise(philox, indices, draw, shape, Purpose.SAMPLING)))

        embedded = self.conditions.embedded(mapped(condition, runtime.put))
        with runtime.autocast():
            denoiser = runtime.inference(self.denoiser)
            if watcher is not None:
                denoiser = Watched(denoiser, self.objective, watcher)
            return self.sampler(denoiser, self.objective, noise, embedded)

    def images_in_step(self, indices: NDArray[np.int64], condition: Condition, at_most: int) -> NDArray[np.uint8]:
        """Return `images` of 0 to ``at_most`` indices, whose rows of ``condition`` are their conditions.

        The network's batch always has the size for ``at_most``, which must be the same on every process. Every process
        must call it.
        """
        filled = _filled(indices, at_most + -at_most % self.runtime.num_local_devices)
        return self.images(filled, rows_of(condition, filled))[: len(indices)]

    def batches(
        self, condition: Condition, num_images: int, batch_size: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Yield this process's share of the images of a condition as (indices, images), about ``batch_size`` at once.

        Every round of every process has the same number of rows, a multiple of its devices; excess rows are
        repetitions, which are discarded. Every process must exhaust it.
        """
        for indices, count in equal_rounds(num_images, batch_size, self.runtime):
            images = self.images(indices, rows_of(condition, indices))
            if count:
                yield indices[:count], images[:count]

    def all_images(self, condition: Condition, num_images: int, batch_size: int) -> NDArray[np.uint8]:
        """Return images 0 .. num_images - 1 of a condition, on every process. Every process must call it."""
        parts = [images for _, images in self.batches(condition, num_images, batch_size)]
        side, channels = self.spec.image_size, self.spec.channels
        empty = np.empty((0, side, side, channels), np.uint8)  # a process may get no share
        return self.runtime.gather(np.concatenate(parts) if parts else empty)


def equal_rounds(num_items: int, batch_size: int, runtime: Devices) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Yield this process's share of range(num_items) in rounds of about ``batch_size``: indices, how many count.

    Rounds are equal in number and size on every process, as devices that compute together require; the indices at the
    end of a round that do not count are repetitions.
    """
    multiple = runtime.num_local_devices
    share = -(-num_items // runtime.data_world)
    num_rounds = -(-share // max(batch_size, multiple))
    rows = -(-share // num_rounds)
    rows += -rows % multiple
    mine = np.array_split(np.arange(num_items), runtime.data_world)[runtime.data_rank]
    for start in range(0, num_rounds * rows, rows):
        indices = mine[start : start + rows]
        yield _filled(indices, rows), len(indices)


def _filled(values: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Return the values repeated to length ``rows``, or zeros if there are no values: [rows]."""
    return np.resize(values if len(values) else np.zeros(1, np.int64), rows)


def _require_finite(decoded: torch.Tensor, indices: NDArray[np.int64], runtime: Devices) -> None:
    """Raise ValueError for images [B, C, H, W] that are not finite, which would become black."""
    bad = indices[~decoded.isfinite().flatten(1).all(dim=1).numpy()]
    if len(bad):
        with runtime.autocast():
            rounds = torch.is_autocast_enabled(runtime.device.type)
        raise ValueError(
            f"{len(bad)} of {len(indices)} images are not finite (the first is image {bad[0]}); the weights have "
            f"diverged or the network overflowed: take an earlier checkpoint{', or precision=fp32' if rounds else ''}."
        )
