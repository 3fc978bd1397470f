"""Fill the latents and the noise of many samples by one compiled call, which holds Python's global lock (GIL) once.

Files, streams of random numbers and autoencoders each offer a compiled function with its inputs. Where one of them has
none to offer, or not yet (`core.deferred`), the caller does the same by their other methods.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.deferred import Deferred


class Reads(NamedTuple):
    """A compiled function that reads rows, and from where; the files stay open while this exists."""

    read_rows: Callable[..., int]
    descriptors: NDArray[np.int32]  # [B]
    offsets: NDArray[np.int64]  # [B]
    files: object


class Normals(NamedTuple):
    """A compiled function that draws normals, with the numbers that address streams and its table."""

    fill_normals: Callable[..., None]
    key: NDArray[np.uint64]
    table: NDArray[np.uint32]

    def write(self, out: NDArray[np.float32], positions: NDArray[np.int64]) -> None:
        """Write the normals of each position's stream to its row of ``out`` [B, n]."""
        self.fill_normals(out, positions, self.key, self.table)


class Latents(NamedTuple):
    """A compiled function that draws latents from moments, with its table, and each latent's shift and scale."""

    fill_latents: Callable[..., None]
    deviations: NDArray[np.float32]  # [65536]
    shift: NDArray[np.float32]  # [1 or c]
    scale: NDArray[np.float32]  # [1 or c]


class SampleFiller(NamedTuple):
    """The compiled parts of samples, the same for all batches of a run, which one compiled loop calls."""

    posterior: Normals
    latents: Latents
    noise: Normals

    def fill(
        self,
        reads: Reads,
        positions: NDArray[np.int64],
        latents: NDArray[np.float32],
        noise: NDArray[np.float32],
        moments: NDArray[np.float16],
        rows: slice,
    ) -> int:
        """Fill some rows of ``latents`` and ``noise`` [B, c, h, w]; return the first one that was not filled.

        That is ``rows.stop``, except where a file was cut. ``moments`` [samples, 2c, h, w] has the memory for as many
        samples as are read at once.
        """
        compiled = FAST_SAMPLES.get(0)
        if compiled is None:
            return int(rows.start)
        functions = (reads.read_rows, self.posterior.fill_normals, self.latents.fill_latents)
        return compiled.fill_samples(
            compiled.references_to(*functions),
            reads.descriptors,
            reads.offsets,
            positions,
            self.posterior.key,
            self.noise.key,
            self.posterior.table,
            *self.latents[1:],
            moments.reshape(*moments.shape[:2], -1).view(np.uint16),
            latents.reshape(len(latents), -1),
            noise.reshape(len(noise), -1),
            rows.start,
            rows.stop,
        )


class CompiledSamples(NamedTuple):
    """The functions of `core.compiled_samples`."""

    fill_samples: Callable[..., int]
    references_to: Callable[..., NDArray[np.int64]]


def _load_samples() -> CompiledSamples:
    compiled: Any = import_module("core.compiled_samples")
    return CompiledSamples(compiled.fill_samples, cache(compiled.references_to))  # a call takes 0.15 ms


SLOWER = "slower where several threads make them"
FAST_SAMPLES = Deferred("batches", _load_samples, worth=0, without=SLOWER)


def sample_filler(posterior: Normals | None, latents: Latents | None, noise: Normals | None) -> SampleFiller | None:
    """Return the parts where none is missing."""
    if posterior is None or latents is None or noise is None:
        return None
    assert posterior.fill_normals is noise.fill_normals, "one generator draws both"
    return SampleFiller(posterior, latents, noise)
