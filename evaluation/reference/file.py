"""Write a reference file: statistics over a whole data set, and some of its images."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.draws import Philox, Purpose, permutation
from core.npz import Blocks, write_npz
from core.prefetch import prefetch
from core.progress import ProgressBar
from evaluation.features.extractor import FeatureExtractor, require_finite
from evaluation.metrics.collectors import StatisticsCollector
from evaluation.reference.image_sets import ImageSet
from runtime.protocol import Processes


def write_reference(
    path: Path,
    images: ImageSet,
    extractor: FeatureExtractor,
    *,
    num_kept: int,
    seed: int,
    batch_size: int,
    runtime: Processes,
    progress: ProgressBar,
) -> None:
    """Write statistics of all images, and ``num_kept`` images chosen by ``seed`` (all, if there are fewer).

    Every process must call it; each computes its share, and the main one writes.
    """
    vectors, spatial, has_spatial = _collect(images, extractor, batch_size, runtime, progress)
    statistics = {"": vectors.merged(runtime.gather)}
    if runtime.gather(np.array([has_spatial])).any():  # a process without a share must take part too
        statistics["_s"] = spatial.merged(runtime.gather)
    if not runtime.is_main:
        return
    about = {
        "name": images.name,
        "fingerprint": images.fingerprint,
        "images": len(images),
        "num_classes": images.num_classes,
        "feature_extractor": extractor.title,
        "feature_extractor_hash": extractor.hash,
        "seed": seed,
    }
    arrays: dict[str, NDArray[np.generic] | Blocks] = {"about": np.array(json.dumps(about))}
    for suffix, found in statistics.items():
        arrays |= {f"mu{suffix}": found.mean, f"sigma{suffix}": found.covariance}
    arrays["arr_0"] = _chosen_images(images, num_kept, seed, batch_size)
    write_npz(path, arrays, zip64=True)


def _collect(
    images: ImageSet, extractor: FeatureExtractor, batch_size: int, runtime: Processes, progress: ProgressBar
) -> tuple[StatisticsCollector, StatisticsCollector, bool]:
    """Return sums of vectors and of spatial features over this process's share, and whether there are spatial ones."""
    vectors, spatial, has_spatial = StatisticsCollector("vectors"), StatisticsCollector("spatial"), False
    mine = list(_batches(np.arange(len(images)), batch_size))[runtime.data_rank :: runtime.data_world]
    with progress("reference", 0, len(images), "img") as bar:
        for rows, pixels in prefetch((rows, images.images(rows)) for rows in mine):
            features = require_finite(extractor(pixels), extractor)
            vectors.add(rows, features)
            if features.spatial is not None:
                has_spatial = True
                spatial.add(rows, features)
            bar.update(len(rows) * runtime.data_world)
    return vectors, spatial, has_spatial


def _chosen_images(images: ImageSet, num_kept: int, seed: int, batch_size: int) -> Blocks:
    """Return images [num_images, H, W, C] uint8 in a random order that the seed determines."""
    chosen = permutation(Philox(seed), 0, Purpose.REFERENCE, len(images))[:num_kept]
    shape = images.images(chosen[:1]).shape[1:]
    return Blocks(
        (len(chosen), *shape), np.dtype(np.uint8), (images.images(rows) for rows in _batches(chosen, batch_size))
    )


def _batches(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
