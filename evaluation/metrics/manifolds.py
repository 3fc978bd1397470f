"""Compute precision and recall with k-nearest-neighbor manifolds."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.precision import exact_float32
from evaluation.features.extractor import FeatureExtractor
from evaluation.metrics.collectors import RowsOf
from evaluation.metrics.metric import require_images, require_reference_images
from evaluation.reference.reference import Reference

SquaredDistances = Callable[[Tensor, Tensor], Tensor]  # [n, D], [m, D] -> [n, m]


def fp32_squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return |u|^2 - 2 u v + |v|^2 in float32, clamped to at least 0."""
    squares, others = first.square().sum(dim=1, keepdim=True), second.square().sum(dim=1)
    return torch.clamp(squares - 2 * (first @ second.T) + others, min=0)


def adm_fp16_squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return squared distances with every intermediate rounded to float16, as in ADM's suite, or in float32.

    Sums inside a product run in float32, as on a GPU. A block that overflows in float16 is computed in float32, so the
    block size can affect results if features are large; ADM's blocks are 10,000 x 10,000.
    """
    u, v = first.half(), second.half()
    squares = u.square().float().sum(dim=1, keepdim=True).half()
    others = v.square().float().sum(dim=1).half()
    distances = (squares - 2 * (u.float() @ v.float().T).half()) + others
    if not torch.isfinite(distances).all():
        return fp32_squared_distances(first, second)
    return torch.clamp(distances.float(), min=0)


_DISTANCES: dict[str, SquaredDistances] = {"fp32": fp32_squared_distances, "adm_fp16": adm_fp16_squared_distances}


class PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019) with ADM's counts.

    A manifold is the union of balls around each image that reach to its ``k``-th neighbor. Precision is the fraction
    of generated images inside the manifold of the reference's images (ADM's files hold 10,000); recall is the
    reverse, with balls of all generated images (ADM's protocol: 50,000). ``distances`` selects squared distances in
    fp32 or in ADM's fp16. They are computed in blocks of ``block`` x ``block`` and not stored.
    """

    collects = RowsOf("vectors")

    def __init__(self, k: int = 3, distances: Literal["fp32", "adm_fp16"] = "fp32", block: int = 10_000) -> None:
        if k < 1 or block < 1:
            raise ValueError(f"precision_recall has k={k} and block={block}, but both must be at least 1.")
        self._k, self._block = k, block
        self._distances = _DISTANCES[distances]
        self.settings: Mapping[str, Any] = {"k": k, "distances": distances}

    def require(self, extractor: FeatureExtractor, reference: Reference, num_images: int) -> None:
        """Raise ValueError unless generated images and the reference's outnumber the neighbors."""
        require_images("precision_recall", self._k + 1, num_images, f"{self._k} neighbors")
        require_reference_images("precision_recall", self._k + 1, reference, f"{self._k} neighbors")

    @torch.no_grad()
    def compute(self, samples: NDArray[np.float32], reference: Reference, device: torch.device) -> dict[str, float]:
        """Return ``precision`` and ``recall``."""
        with exact_float32(device):
            real, fake = (torch.from_numpy(rows).to(device) for rows in (reference.vectors(), samples))
            precision, recall = self._fractions_inside(real, fake)
        return {"precision": precision, "recall": recall}

    def _squared_radii(self, rows: Tensor) -> Tensor:
        """Return [n], each row's squared distance to its k-th neighbor; the nearest of k + 1 rows is the row itself."""
        radii = []
        for block in rows.split(self._block):
            nearest = torch.full((len(block), self._k + 1), torch.inf, device=rows.device)
            for others in rows.split(self._block):
                candidates = torch.cat([nearest, self._distances(block, others)], dim=1)
                nearest = candidates.topk(self._k + 1, dim=1, largest=False).values
            radii.append(nearest.amax(dim=1))
        return torch.cat(radii)

    def _fractions_inside(self, real: Tensor, fake: Tensor) -> tuple[float, float]:
        """Return the fraction of fake [m, D] in a ball around some real [n, D], and of real in a ball around some fake.

        Both use one table of distances, whose rows are the real images as in ADM's suite: rounded to float16, the
        transposed table has other numbers.
        """
        fake_inside, fake_blocks = self._blocks_of(fake)
        real_inside, real_blocks = self._blocks_of(real)
        for reals, real_radii, reals_inside in real_blocks:
            for fakes, fake_radii, fakes_inside in fake_blocks:
                distances = self._distances(reals, fakes)
                fakes_inside |= (distances <= real_radii[:, None]).any(dim=0)
                reals_inside |= (distances <= fake_radii).any(dim=1)
        return float(fake_inside.double().mean()), float(real_inside.double().mean())

    def _blocks_of(self, rows: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Return a mask [n] of rows found in a ball, all False, and blocks of rows, of their radii and of the mask."""
        inside = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        parts = (part.split(self._block) for part in (rows, self._squared_radii(rows), inside))
        return inside, list(zip(*parts, strict=True))
