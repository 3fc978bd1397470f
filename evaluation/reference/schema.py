"""Check a reference file before any of it is used; only this file defines what it may hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from core.npy import Header
from core.npz import headers_of, read_array
from core.reading import DamagedFileError
from core.records import parse_object, printable

IMAGES, ABOUT = "arr_0", "about"
BATCH = 250  # images whose features are computed at once
LARGEST_STATISTICS = 2**14  # features
_MOST_BYTES_OF_BATCH = 2**33
_MOST_BYTES_OF_ABOUT = 2**22
_SHOWN = 80  # characters of a value in an error
_LARGEST = {1: 1e38, 2: 1e76}  # bounds by dimension: of a mean and a covariance of float32 features
_ASYMMETRY = 1e-4  # relative to the largest entry; far above rounding errors, also in float32


Title = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(printable)]


class About(BaseModel):
    """The description in a file of ``ditscale reference``; ADM's files have none."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: Title | None = None
    images: Annotated[int, Field(ge=2, le=2**53)] | None = None
    num_classes: Annotated[int, Field(ge=1, le=2**53)] | None = None
    feature_extractor: Title = "2015 Inception features"
    feature_extractor_hash: Title | None = None


def read_headers(path: Path) -> dict[str, Header]:
    """Return the headers of a reference's arrays.

    Raises the OSErrors of `open`, and ValueError that names the file where it is not a reference.
    """
    headers = headers_of(path)
    for mu, sigma, optional in (("mu", "sigma", False), ("mu_s", "sigma_s", True)):
        if not optional or mu in headers or sigma in headers:
            _require_statistics(path, headers, mu, sigma)
    if IMAGES in headers:
        _require_images(path, headers[IMAGES])
    return headers


def _require_statistics(path: Path, headers: Mapping[str, Header], mu: str, sigma: str) -> None:
    for name in (mu, sigma):
        if name not in headers:
            raise ValueError(
                f"The reference {path} has no {name} (it has {', '.join(headers)}); fetch one of ADM's, or make "
                "one by `ditscale reference`."
            )
        if headers[name].dtype.kind != "f" or headers[name].dtype.itemsize > 8:
            raise ValueError(
                f"The reference {path} has {name} of {headers[name].dtype}, but statistics are float32 or float64; "
                "fetch or make it again."
            )
    dimensions, theirs = headers[mu].shape, headers[sigma].shape
    if len(dimensions) != 1 or theirs != 2 * dimensions:
        raise ValueError(
            f"The reference {path} has {mu} of shape {dimensions} and {sigma} of shape {theirs}; fetch or make it "
            "again."
        )
    if not 1 <= dimensions[0] <= LARGEST_STATISTICS:
        raise ValueError(
            f"The reference {path} has {dimensions[0]} numbers in {mu}, but from 1 to {LARGEST_STATISTICS} are read; "
            "fetch or make it again."
        )


def _require_images(path: Path, header: Header) -> None:
    """Raise ValueError unless the images are square, uint8 and of a size that a batch can be read at."""
    shape = header.shape
    if header.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or min(shape) < 1:
        raise ValueError(
            f"The reference {path} has arr_0 of {header.dtype} {shape}, but images are uint8 [num_images, size, size, "
            "channels]; fetch or make it again, or leave arr_0 out where no metric needs images."
        )
    if (size := BATCH * header.num_value_bytes // shape[0]) > _MOST_BYTES_OF_BATCH:
        raise ValueError(
            f"The reference {path} has images of {shape[1]}x{shape[2]}x{shape[3]}, of which {BATCH} take {size} bytes, "
            f"but at most {_MOST_BYTES_OF_BATCH} are read at once; make it of smaller ones."
        )


def read_about(path: Path, headers: Mapping[str, Header]) -> About:
    """Return the description in a reference. Raises ValueError that names the file and the first wrong field."""
    if ABOUT not in headers:
        return About()
    header = headers[ABOUT]
    try:
        if header.shape or header.dtype.kind != "U":
            raise DamagedFileError(f"it is {header.dtype} {header.shape}, not text")
        text = str(read_array(path, ABOUT, _MOST_BYTES_OF_ABOUT))
        parse_object(text, "it")
        return About.model_validate_json(text)
    except ValidationError as error:
        found = error.errors()[0]
        what = f"has {found['loc'][0]} {repr(found['input'])[:_SHOWN]}, but" if found["loc"] else "cannot be read:"
        raise ValueError(f"about of the reference {path} {what} {found['msg'].lower()}; make it again.") from None
    except DamagedFileError as error:
        what = str(error).rstrip(".")
        raise ValueError(f"about of the reference {path} cannot be read: {what}; make it again.") from None


def read_gaussian(path: Path, mu: str, sigma: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean [D] and covariance [D, D] of a reference.

    Raises ValueError for values that are not finite or are larger than float32 features give, and for a matrix that is
    not symmetric.
    """
    mean, covariance = (
        read_array(path, name, LARGEST_STATISTICS**2 * np.float64().nbytes).astype(np.float64) for name in (mu, sigma)
    )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{mu} or {sigma} of the reference {path} is not finite; fetch or make it again.")
    for name, values in ((mu, mean), (sigma, covariance)):
        if (largest := float(np.abs(values).max())) > _LARGEST[values.ndim]:
            raise ValueError(
                f"{name} of the reference {path} has a value of size {largest:.6g}, but float32 features give at most "
                f"{_LARGEST[values.ndim]}; fetch or make it again."
            )
    apart = np.abs(covariance - covariance.T)
    if apart.max() > _ASYMMETRY * np.abs(covariance).max():
        row, column = np.unravel_index(int(apart.argmax()), apart.shape)
        raise ValueError(
            f"{sigma} of the reference {path} is not symmetric: {covariance[row, column]:.6g} in row {row}, column "
            f"{column}, but {covariance[column, row]:.6g} in row {column}, column {row}; fetch or make it again."
        )
    return mean, (covariance + covariance.T) / 2
