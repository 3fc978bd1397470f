"""Compute kernel distances on any features, and KID on Inception's."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.draws import Philox, Purpose, permutation
from evaluation.features.extractor import FeatureExtractor
from evaluation.metrics.collectors import RowsOf
from evaluation.metrics.metric import require_images, require_inception, require_reference_images
from evaluation.reference.reference import Reference


class KernelDistance:
    """The mean over subsets of the unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3.

    Binkowski et al. 2018. Subset i has ``subset_size`` images of each side, chosen by (``seed``, i) alone. Computed in
    float64. It may be slightly negative where the distributions agree.
    """

    name = "kernel"
    collects = RowsOf("vectors")

    def __init__(self, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> None:
        if subsets < 1 or subset_size < 2:
            raise ValueError(
                f"A kernel distance has subsets={subsets} and subset_size={subset_size}, but needs at least 1 and 2."
            )
        self._subsets, self._subset_size, self._philox = subsets, subset_size, Philox(seed)
        self.settings: Mapping[str, Any] = {"subsets": subsets, "subset_size": subset_size, "seed": seed}

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Raise ValueError where generated images or the reference's are fewer than one subset."""
        require_images(self.name, self._subset_size, num_images, "one subset")
        require_reference_images(self.name, self._subset_size, reference, "one subset")

    @torch.no_grad()
    def compute(self, samples: NDArray[np.float32], reference: Reference, device: torch.device) -> dict[str, float]:
        """Return ``kernel_distance`` and its standard deviation over subsets."""
        distances = self._distances(samples, reference.vectors(), device)
        return {"kernel_distance": float(distances.mean()), "kernel_distance_std": float(distances.std())}

    def _distances(
        self, samples: NDArray[np.float32], real: NDArray[np.float32], device: torch.device
    ) -> NDArray[np.float64]:
        """Return the distance of each subset, [num_subsets]."""
        found = []
        for subset in range(self._subsets):
            of_samples, of_real = (
                torch.from_numpy(rows[self._chosen(2 * subset + side, len(rows))]).to(device).double()
                for side, rows in enumerate((samples, real))
            )
            found.append(squared_mmd(of_samples, of_real))
        return torch.stack(found).cpu().numpy()

    def _chosen(self, position: int, length: int) -> NDArray[np.int64]:
        return permutation(self._philox, position, Purpose.SUBSET, length)[: self._subset_size]


class KernelInceptionDistance(KernelDistance):
    """KID: the kernel distance on pool3 of the 2015 Inception."""

    name = "kid"

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Raise ValueError for other features, or fewer images of either kind than one subset."""
        require_inception(self.name, extractor)
        super().require(extractor, reference, num_images)

    @torch.no_grad()
    def compute(self, samples: NDArray[np.float32], reference: Reference, device: torch.device) -> dict[str, float]:
        """Return ``kid`` and its standard deviation over subsets."""
        distances = self._distances(samples, reference.vectors(), device)
        return {"kid": float(distances.mean()), "kid_std": float(distances.std())}


def squared_mmd(first: Tensor, second: Tensor) -> Tensor:
    """Return the unbiased estimate, a scalar, from [m, D] and [m, D] (equation 4 of Binkowski et al.)."""
    m = len(first)
    within = sum(_kernel(rows, rows).sum() - _kernel_with_itself(rows).sum() for rows in (first, second))
    return within / (m * (m - 1)) - 2 * _kernel(first, second).mean()


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _kernel_with_itself(rows: Tensor) -> Tensor:
    """Return the kernel's diagonal, [m]."""
    return (rows.square().sum(dim=1) / rows.shape[1] + 1) ** 3
