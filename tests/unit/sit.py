"""Load the outputs of SiT's program (willisma/SiT) for a tiny network, shared by the tests that compare with them."""

import functools

import numpy as np
import torch
from torch import Tensor

from core.rooms import ROOT
from model.convert import from_sit
from model.dit import DiT

HEADS = 4  # of the network
CLASSES = 7


@functools.cache
def golden() -> dict[str, Tensor]:
    """Return all arrays of the file by name."""
    with np.load(ROOT / "tests/golden/sit_tiny.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def weights() -> dict[str, Tensor]:
    """Return the network's weights under SiT's names: 7 classes, 4 latent channels, side 8."""
    return {name.removeprefix("weights/"): value for name, value in golden().items() if name.startswith("weights/")}


def network() -> DiT:
    """Return the network, for inference."""
    return from_sit(weights(), HEADS).eval().requires_grad_(False)


def under(prefix: str) -> list[str]:
    """Return the names of arrays that begin with a prefix, without it."""
    return [name.removeprefix(prefix) for name in golden() if name.startswith(prefix)]
