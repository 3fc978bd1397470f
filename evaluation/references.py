"""What generated images are compared with.

A reference file has the arrays of ADM's ``VIRTUAL_imagenet*_labeled.npz``: ``mu`` [2048] and ``sigma`` of pool3
over the whole data set, ``mu_s`` [2023] and ``sigma_s`` of the spatial features, and ``arr_0`` uint8 [N, H, W, 3], the
images for precision and recall. Ours has ``about`` besides: JSON that says what it was made of and by which extractor.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.atomic import atomic_file
from data.images import Crop
from data.progress import ProgressBar
from data.reading import sha256_of
from data.sources import Source, load_images
from diffusion.draws import Philox, Purpose
from evaluation.features import FeatureExtractor, require_finite
from evaluation.inception import NUM_FEATURES, NUM_SPATIAL
from evaluation.inception_features import InceptionFeatures
from evaluation.npz import Header, headers_of, read_array
from evaluation.statistics import FeatureStatistics, Gaussian, Moments, frechet_distance

MAX_BYTES_AT_ONCE = 2**33  # of decoded images


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images, and where there are images beside them, their features."""

    name: str
    hash: str  # of the images, or of the file
    statistics: Moments
    floor: float | None  # Frechet distance of one bootstrap resample: what a perfect generator would get
    spatial: Moments | None = None  # of sFID's features
    num_vectors: int = 0  # images whose features `vectors` gives
    load_vectors: Callable[[], NDArray[np.float32]] | None = None
    image_size: int | None = None  # pixels, where it is known
    num_classes: int | None = None

    def vectors(self) -> NDArray[np.float32]:
        """[num_vectors, D]: for manifolds and kernels, computed at the first use."""
        assert self.load_vectors is not None, "a metric did not require vectors of a reference without any"
        return self.load_vectors()

    def require(self, image_size: int, num_classes: int) -> None:
        """Raise ValueError where generated images are of another size, or of other classes."""
        for what, theirs, ours in (
            ("images of side", self.image_size, image_size),
            ("classes:", self.num_classes, num_classes),
        ):
            if theirs is not None and theirs != ours:
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
    """The reference of all images of a small source. Raises ValueError for one that memory may not hold."""
    bytes_ = len(source) * image_size**2 * 3
    if bytes_ > MAX_BYTES_AT_ONCE:
        raise ValueError(
            f"The {len(source)} images of {source.name} take {bytes_ / 2**30:.0f} GiB, but a reference in memory may "
            f"take {MAX_BYTES_AT_ONCE / 2**30:.0f}; make a file by `ditscale reference` and name it by "
            "evaluation.reference."
        )
    images, _ = load_images(source, image_size, crop, apply_exif)
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
    """A file of ADM's, or of ``ditscale reference``.

    What takes long (features of ``arr_0``, roots of the covariances) is kept in ``cache`` by the hashes of the
    file, of the extractor and of this room's code. Raises ValueError for a file that is missing, damaged, or made by
    another extractor.
    """
    if not path.is_file():
        raise ValueError(
            f"There is no reference {path}; fetch ADM's VIRTUAL_imagenet256_labeled.npz (or that of another size) "
            "from the guided-diffusion repository's evaluations page, or make one by `ditscale reference`."
        )
    headers = headers_of(path)
    _require_statistics(path, headers)
    _require_images(path, headers.get("arr_0"))
    about = _about(path) if "about" in headers else _About()
    _require_extractor(path, about, headers, extractor)
    hash_ = sha256_of(path)
    kept = _Kept(cache / f"reference-{hash_[:16]}-{extractor.hash[:16]}-{_code_hash()[:8]}")

    def gaussian(mu: str, sigma: str) -> Gaussian:
        mean, covariance = _read_gaussian(path, mu, sigma)
        return Gaussian(mean, covariance, about.images, lambda name, compute: kept.get(f"{name}-{sigma}", compute))

    num_vectors, image_size = headers["arr_0"].shape[:2] if "arr_0" in headers else (0, None)
    return Reference(
        name=about.name or path.name,
        hash=hash_,
        statistics=gaussian("mu", "sigma"),
        floor=None,
        spatial=gaussian("mu_s", "sigma_s") if "mu_s" in headers else None,
        num_vectors=num_vectors,
        load_vectors=lambda: kept.get("vectors", lambda: _vectors_of(path, extractor, progress)),
        image_size=image_size,
        num_classes=about.num_classes,
    )


def _require_statistics(path: Path, headers: Mapping[str, Header]) -> None:
    for mu, sigma, optional in (("mu", "sigma", False), ("mu_s", "sigma_s", True)):
        if optional and mu not in headers and sigma not in headers:
            continue
        for name in (mu, sigma):
            if name not in headers:
                raise ValueError(
                    f"The reference {path} has no {name} (it has {', '.join(headers)}); fetch one of ADM's, or make "
                    "one by `ditscale reference`."
                )
        (*dimensions,), theirs = headers[mu].shape, headers[sigma].shape
        if len(dimensions) != 1 or theirs != (dimensions[0], dimensions[0]):
            raise ValueError(
                f"The reference {path} has {mu} of shape {headers[mu].shape} and {sigma} of shape {theirs}; fetch or "
                "make it again."
            )


def _require_images(path: Path, header: Header | None) -> None:
    """Levels from 0 to 255, or features would be of something else."""
    if header is None:
        return
    shape = header.shape
    if header.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2]:
        raise ValueError(
            f"The reference {path} has arr_0 of {header.dtype} {shape}, but images are uint8 [N, size, size, "
            "channels]; fetch or make it again, or leave arr_0 out where no metric needs images."
        )


class _About(BaseModel):
    """What our own file says of itself; one of ADM's says nothing."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: str | None = None
    images: Annotated[int, Field(ge=2)] | None = None
    num_classes: int | None = None
    feature_extractor: str = "2015 Inception features"
    feature_extractor_hash: str | None = None


def _about(path: Path) -> _About:
    try:
        return _About.model_validate_json(str(read_array(path, "about")))
    except ValidationError as error:
        found = error.errors()[0]
        what = f"has {found['loc'][0]} {found['input']!r}, but" if found["loc"] else "cannot be read:"
        raise ValueError(f"about of the reference {path} {what} {found['msg'].lower()}; make it again.") from error


def _require_extractor(path: Path, about: _About, headers: Mapping[str, Header], extractor: FeatureExtractor) -> None:
    """A file without ``about`` is ADM's, of the 2015 Inception."""
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


def _read_gaussian(path: Path, mu: str, sigma: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean, covariance = (read_array(path, name).astype(np.float64) for name in (mu, sigma))
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{mu} or {sigma} of the reference {path} is not finite; fetch or make it again.")
    return mean, (covariance + covariance.T) / 2


def _vectors_of(path: Path, extractor: FeatureExtractor, progress: ProgressBar) -> NDArray[np.float32]:
    """Features of ``arr_0``."""
    images, parts = read_array(path, "arr_0"), []
    with progress("reference", 0, len(images), "img") as bar:
        for start in range(0, len(images), 250):
            found = require_finite(extractor(images[start : start + 250]), extractor)
            parts.append(found.vectors)
            bar.update(len(found.vectors))
    return np.concatenate(parts)


def _code_hash() -> str:
    """Of the code that computes features and roots: what an earlier version kept may be something else."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Kept:
    """Arrays in a folder, computed once; other processes wait for the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: str, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array of this name; a damaged file is made again."""
        path = self._folder / f"{name}.npy"
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            with suppress(FileNotFoundError, ValueError, EOFError):
                kept: NDArray[Any] = np.load(path, allow_pickle=False)
                return kept
            array = compute()
            with atomic_file(path) as file:
                np.save(file, array, allow_pickle=False)
        return array
