"""Compute the tables of numpy's ziggurat for float32 normals, with 256 layers (Marsaglia and Tsang 2000).

A 32-bit word is, from its lowest bit: 8 bits of layer, 1 of sign and 23 of magnitude. Layer 0 is the base strip with
the tail; layer i >= 1 reaches from the density at edge x_i up to that at x_(i-1), x_255 = R, x_0 = 0.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

R = 3.6541528853610088  # the edge where the tail begins
_LAYERS = 256
SIDES = 2 * _LAYERS  # of layers: positive ones, then negative ones
_MAGNITUDES = 2.0**23


class Tables(NamedTuple):
    """The ziggurat of float32 normals."""

    widths: NDArray[np.float32]  # [512] of a magnitude's unit, by layer; negative in the second half
    limits: NDArray[np.int32]  # [512] magnitudes below are inside the layer's core, where each point is accepted
    heights: NDArray[np.float32]  # [256] density at the layer's edge

    def bits(self) -> NDArray[np.uint32]:
        """Return the bits of all tables, one after another, [1280]."""
        return np.concatenate([table.view(np.uint32) for table in self])


def tables() -> Tables:
    """Return the tables, computed in float64."""
    area = R * _density(R) + math.sqrt(math.pi / 2) * math.erfc(R / math.sqrt(2))  # of each layer
    edges = [0.0] * (_LAYERS - 1) + [R]
    for layer in range(_LAYERS - 2, 0, -1):
        edges[layer] = math.sqrt(-2 * math.log(area / edges[layer + 1] + _density(edges[layer + 1])))
    base = area / _density(R)  # the width of a rectangle with the area of the base strip
    widths = np.array([base, *edges[1:]]) / _MAGNITUDES
    cores = [R / base, *(inner / outer for inner, outer in pairwise(edges))]
    limits = [round(core * _MAGNITUDES) for core in cores]
    return Tables(
        widths=np.concatenate([widths, -widths]).astype(np.float32),
        limits=np.array([*limits, *limits], dtype=np.int32),
        heights=np.array([_density(edge) for edge in edges], dtype=np.float32),
    )


def _density(x: float) -> float:
    return math.exp(-0.5 * x * x)
