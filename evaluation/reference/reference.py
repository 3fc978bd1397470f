"""Read or compute the reference that generated images are compared with.

A reference file has the arrays of ADM's ``VIRTUAL_imagenet*_labeled.npz``: ``mu`` [2048] and ``sigma`` of pool3
over the whole data set, ``mu_s`` [2023] and ``sigma_s`` of the spatial features, and ``arr_0`` uint8
[num_images, H, W, 3], the images for precision and recall. Files of ``ditscale reference`` also have ``about``: JSON
with the data set and the extractor that they were made with.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.draws import Philox, Purpose
from core.locks import locked
from core.npy import Header
from core.npz import rows_of
from core.progress import ProgressBar
from core.reading import DamagedFileError, sha256_of
from core.rooms import source_hash
from data.images import Crop
from data.sources import Source, load_images
from evaluation.features.extractor import FeatureExtractor, require_finite
from evaluation.features.inception import InceptionFeatures
from evaluation.features.inception_network import NUM_FEATURES, NUM_SPATIAL
from evaluation.kept import npy_of, parse_npy, read_kept, unless_damaged, write_kept
from evaluation.metrics.statistics import FeatureStatistics, Gaussian, Moments, frechet_distance
from evaluation.reference.schema import BATCH, IMAGES, About, read_about, read_gaussian, read_headers

MAX_BYTES_AT_ONCE = 2**33  # of decoded images
_OF_SHARDS = (
    "name a reference of the shards, where it is left out, by evaluation.reference "
    "(`ditscale reference evaluation/image_set=shards` makes one)"
)


@dataclass(frozen=True)
class Reference:
    """Statistics of real images and, if it has images, their features."""

    name: str
    hash: str  # SHA-256 of the images, or of the file
    statistics: Moments
    floor: float | None  # Frechet distance of one bootstrap resample, about that of a perfect generator
    spatial: Moments | None = None  # of sFID's features
    num_vectors: int = 0  # number of images whose features `vectors` returns
    load_vectors: Callable[[], NDArray[np.float32]] | None = None
    image_size: int | None = None  # pixels, if known
    num_classes: int | None = None

    def vectors(self) -> NDArray[np.float32]:
        """Return the features [num_vectors, D] for manifolds and kernels, computed at the first use."""
        assert self.load_vectors is not None, "a metric did not require vectors of a reference without any"
        return self.load_vectors()

    def require(self, image_size: int, num_classes: int | None) -> None:
        """Raise ValueError where generated images have another size, or number of classes if they are of classes."""
        for what, theirs, ours in (
            ("images of side", self.image_size, image_size),
            ("classes:", self.num_classes, num_classes),
        ):
            if theirs is not None and ours is not None and theirs != ours:
                raise ValueError(
                    f"The reference {self.name} has {what} {theirs}, but the generated images {ours}; choose another "
                    "evaluation.reference, or make one by `ditscale reference`."
                )


def make_reference(
    source: Source,
    image_size: int,
    extractor: FeatureExtractor,
    crop: Crop | None = None,
    apply_exif: bool = False,
) -> Reference:
    """Return the reference of all images of a small source. Raises ValueError where they are too large for memory."""
    bytes_ = len(source) * image_size**2 * 3
    if bytes_ > MAX_BYTES_AT_ONCE:
        raise ValueError(
            f"The {len(source)} images of {source.name} take {bytes_ / 2**30:.0f} GiB, but a reference in memory may "
            f"take {MAX_BYTES_AT_ONCE / 2**30:.0f}; make a file by `ditscale reference` and name it by "
            "evaluation.reference."
        )
    images, _ = load_images(source, image_size, crop, apply_exif, _OF_SHARDS)
    features = require_finite(extractor(images), extractor)
    statistics = FeatureStatistics.of(features.vectors)
    resampled = FeatureStatistics.of(features.vectors[_bootstrap_rows(len(images))])
    return Reference(
        name=source.name,
        hash=hashlib.sha256(images.tobytes()).hexdigest(),
        statistics=statistics,
        floor=frechet_distance(statistics, resampled),
        spatial=None if features.spatial is None else FeatureStatistics.of(features.spatial),
        num_vectors=len(images),
        load_vectors=lambda: features.vectors,
        image_size=image_size,
        num_classes=len(source.class_names),
    )


def _bootstrap_rows(length: int) -> NDArray[np.int64]:
    return Philox(0).at(0, Purpose.SPLIT, draw=1).integers(length, size=length)


def read_reference(path: Path, extractor: FeatureExtractor, cache: Path, progress: ProgressBar) -> Reference:
    """Return the reference in a file of ADM's, or of ``ditscale reference``.

    Slow results (features of ``arr_0``, roots of the covariances) are stored in ``cache`` under the hashes of the
    file, of the extractor and of the code of evaluation/. Raises ValueError for a file that is missing, damaged, or
    made with another extractor.
    """
    try:
        headers, hash_ = read_headers(path), sha256_of(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"There is no reference {path}; fetch ADM's VIRTUAL_imagenet256_labeled.npz (or that of another size) "
            "from the guided-diffusion repository's evaluations page, or make one by `ditscale reference`."
        ) from None
    about = read_about(path, headers)
    _require_extractor(path, about, headers, extractor)
    kept = _Kept(cache, hash_, extractor.hash)

    def gaussian(mu: str, sigma: str) -> Gaussian:
        mean, covariance = read_gaussian(path, mu, sigma)

        def root(name: str, compute: Callable[[], NDArray[np.float64]]) -> NDArray[np.float64]:
            return kept.get(f"{name}-{sigma}", compute, (len(mean), None), np.float64)

        return Gaussian(mean, covariance, about.images, root, f"{sigma} of the reference {path}")

    num_vectors, image_size = headers[IMAGES].shape[:2] if IMAGES in headers else (0, None)
    shape = (num_vectors, *headers["mu"].shape)
    return Reference(
        name=about.name or path.name,
        hash=hash_,
        statistics=gaussian("mu", "sigma"),
        floor=None,
        spatial=gaussian("mu_s", "sigma_s") if "mu_s" in headers else None,
        num_vectors=num_vectors,
        load_vectors=lambda: kept.get(
            "vectors", lambda: _vectors_of(path, hash_, num_vectors, extractor, progress), shape, np.float32
        ),
        image_size=image_size,
        num_classes=about.num_classes,
    )


def _require_extractor(path: Path, about: About, headers: Mapping[str, Header], extractor: FeatureExtractor) -> None:
    """Raise ValueError for features of another extractor. A file without ``about`` has those of the 2015 Inception."""
    theirs, their_hash = about.feature_extractor, about.feature_extractor_hash
    fits = isinstance(extractor, InceptionFeatures) if their_hash is None else their_hash == extractor.hash
    if not fits:
        of = "" if their_hash is None else f" with hash {their_hash[:8]}"
        raise ValueError(
            f"The reference {path} holds {headers['mu'].shape[0]} numbers of {theirs}{of}, but evaluation/features "
            f"gives {extractor.title} with hash {extractor.hash[:8]}; choose the same extractor, or make a reference "
            "of yours by `ditscale reference`."
        )
    for name, size in (("mu", NUM_FEATURES), ("mu_s", NUM_SPATIAL)):
        if their_hash is None and name in headers and headers[name].shape != (size,):
            raise ValueError(
                f"The reference {path} has {headers[name].shape[0]} numbers in {name}, but the 2015 Inception gives "
                f"{size}; fetch one of ADM's, or make one by `ditscale reference`."
            )


def _vectors_of(
    path: Path, hash_: str, count: int, extractor: FeatureExtractor, progress: ProgressBar
) -> NDArray[np.float32]:
    """Return the features of ``arr_0``. Raises ValueError where the file no longer has the hash ``hash_``."""
    if (now := sha256_of(path)) != hash_:
        raise DamagedFileError(f"The reference {path} had sha256 {hash_} when this job began, but has {now} now.")
    parts = []
    with progress("reference", 0, count, "img") as bar:
        for images in rows_of(path, IMAGES, BATCH):
            found = require_finite(extractor(images), extractor)
            parts.append(found.vectors)
            bar.update(len(found.vectors))
    return np.concatenate(parts)


class _Kept:
    """A cache folder of one reference's arrays by one extractor, computed once; other processes wait for the first."""

    def __init__(self, cache: Path, reference: str, extractor: str) -> None:
        code = source_hash("core", "evaluation")  # an earlier version's features may be others
        self._identity = {"reference": reference, "extractor": extractor, "code": code}
        self._folder = cache / f"reference-{reference[:16]}-{extractor[:16]}-{self._identity['code'][:8]}"

    def get(
        self,
        name: str,
        compute: Callable[[], NDArray[Any]],
        shape: tuple[int | None, ...],
        dtype: type[np.generic],
    ) -> NDArray[Any]:
        """Return the array of this name; compute it if its file is missing or damaged."""
        path, identity = self._folder / f"{name}.npy", {**self._identity, "array": name}
        with locked(path.with_suffix(".lock")):
            kept = unless_damaged(lambda: parse_npy(read_kept(path, identity), path, shape, dtype))
            if kept is not None:
                return kept
            array = compute()
            write_kept(path, npy_of(array), identity)
        return array
