"""Images from a denoiser: image i depends on (seed, i) alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data.images import to_uint8
from data.manifest import LatentSpec
from diffusion.draws import Philox, Purpose, draw_noise
from diffusion.process import GaussianDiffusion
from diffusion.protocol import Denoiser
from diffusion.samplers import Sampler
from model.autoencoder import Autoencoder
from runtime.protocol import Runtime

DECODED_AT_ONCE = 32  # images: an autoencoder takes far more memory for one than a sampler does


@dataclass(frozen=True)
class Generator:
    """Everything that turns an image index and a label into an image."""

    denoiser: Denoiser  # guided or not
    process: GaussianDiffusion
    autoencoder: Autoencoder
    sampler: Sampler
    spec: LatentSpec
    seed: int
    runtime: Runtime

    @torch.no_grad()
    def images(self, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images [B, H, W, C] uint8 of the given indices [B] and labels [B].

        B is a multiple of the runtime's devices. Every process must call it, with as many.
        """
        parts = self.runtime.parts(self._latents(indices, labels), DECODED_AT_ONCE)
        decoded = torch.cat([self.runtime.rows(self.autoencoder.decode(part)) for part in parts])
        _require_finite(decoded, indices, self.runtime)
        return to_uint8(decoded)

    def _latents(self, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> torch.Tensor:
        """Samples [B, c, h, w] on the device; nothing is read from it."""
        philox, runtime = Philox(self.seed), self.runtime
        shape = (self.spec.channels, self.spec.latent_size, self.spec.latent_size)

        def noise(draw: int) -> torch.Tensor:
            return runtime.put(torch.from_numpy(draw_noise(philox, indices, draw, shape, Purpose.SAMPLING)))

        with runtime.autocast():
            denoiser = runtime.inference(self.denoiser)
            return self.sampler(denoiser, self.process, noise, runtime.put(torch.from_numpy(labels)))

    def images_in_step(self, indices: NDArray[np.int64], labels: NDArray[np.int64], at_most: int) -> NDArray[np.uint8]:
        """As `images`, for any number of indices up to ``at_most``, none included; the network always sees as many.

        Every process must call it with the same ``at_most``.
        """
        rows = at_most + -at_most % self.runtime.num_local_devices
        indices_, labels_ = (_filled(values, rows) for values in (indices, labels))
        return self.images(indices_, labels_)[: len(indices)]

    def batches(
        self, labels: NDArray[np.int64], batch_size: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """This process's share of len(labels) images as (indices, images), about ``batch_size`` at once.

        Every round of every process has the same number of rows, which its devices divide; rows over are
        repetitions that are thrown away. Every process must exhaust it.
        """
        for indices, count in equal_rounds(len(labels), batch_size, self.runtime):
            images = self.images(indices, labels[indices])
            if count:
                yield indices[:count], images[:count]

    def all_images(self, labels: NDArray[np.int64], batch_size: int) -> NDArray[np.uint8]:
        """Images 0 .. len(labels) - 1 of these labels, on every process. Every process must call it."""
        parts = [images for _, images in self.batches(labels, batch_size)]
        side, channels = self.spec.image_size, self.spec.channels
        empty = np.empty((0, side, side, channels), np.uint8)  # a process may get no share
        return self.runtime.gather(np.concatenate(parts) if parts else empty)


def equal_rounds(num_items: int, batch_size: int, runtime: Runtime) -> Iterator[tuple[NDArray[np.int64], int]]:
    """This process's share of range(num_items), in rounds of about ``batch_size``: indices, how many of them count.

    Rounds are as many and as large on every process, as devices that compute together need; what does not
    count at the end of a round are repetitions.
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
    """The values, then repetitions of them, or zeros where there are none: [rows]."""
    return np.resize(values if len(values) else np.zeros(1, np.int64), rows)


def _require_finite(decoded: torch.Tensor, indices: NDArray[np.int64], runtime: Runtime) -> None:
    """Raise ValueError for images [B, C, H, W] that are not numbers, which would become black ones."""
    bad = indices[~decoded.isfinite().flatten(1).all(dim=1).numpy()]
    if len(bad):
        with runtime.autocast():
            rounds = torch.is_autocast_enabled(runtime.device.type)
        raise ValueError(
            f"{len(bad)} of {len(indices)} images are not finite (the first is image {bad[0]}); the weights have "
            f"diverged or the network overflowed: take an earlier checkpoint{', or precision=fp32' if rounds else ''}."
        )


def balanced_labels(num_images: int, num_classes: int) -> NDArray[np.int64]:
    """Label i is i modulo the number of classes: [num_images] int64."""
    return np.arange(num_images, dtype=np.int64) % num_classes


def random_labels(num_images: int, num_classes: int, seed: int) -> NDArray[np.int64]:
    """Label i is a uniform draw that depends on (seed, i) alone: [num_images] int64."""
    philox = Philox(seed)
    drawn = (philox.at(index, Purpose.SAMPLE_LABEL).integers(num_classes) for index in range(num_images))
    return np.fromiter(drawn, dtype=np.int64, count=num_images)


def given_labels(labels: Sequence[int], num_images: int, num_classes: int) -> NDArray[np.int64]:
    """The given labels repeated to ``num_images``. ValueError for a label outside [0, num_classes].

    ``num_classes`` itself is the null class: an unconditional sample.
    """
    if not labels:
        raise ValueError(f"labels is empty; give classes from 0 to {num_classes - 1}, or leave it out for all of them.")
    for label in labels:
        if not 0 <= label <= num_classes:
            raise ValueError(
                f"labels has {label}, but this model knows the classes 0 to {num_classes - 1}, and "
                f"{num_classes} for none; choose among these."
            )
    return np.resize(np.array(labels, dtype=np.int64), num_images)
