"""Load outputs of the released SiT program for a tiny network with random weights (tests/golden/sit_tiny.npz)."""

import functools

import numpy as np
import torch
from conftest import GOLDEN
from torch import Tensor

from diffusion.flow import Flow
from diffusion.paths import GVPPath, LinearPath, VPPath
from diffusion.predictions import PredictNoise, PredictScore, PredictVelocity
from diffusion.weightings import OfLikelihood, OfVelocity, Unweighted
from model.convert import from_sit
from model.network import Network

PATHS = {"Linear": LinearPath(), "GVP": GVPPath(), "VP": VPPath()}
PREDICTIONS = {"velocity": PredictVelocity(), "noise": PredictNoise(), "score": PredictScore()}
WEIGHTINGS = {"None": Unweighted(), "velocity": OfVelocity(), "likelihood": OfLikelihood()}


@functools.cache
def sit_golden() -> dict[str, Tensor]:
    """Return all arrays by their names. Times in them run from noise (0) to data (1)."""
    with np.load(GOLDEN / "sit_tiny.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@functools.cache
def sit_network() -> Network:
    """Return the network with its own weights, which sees SiT's time and has two outputs per channel."""
    golden = sit_golden()
    weights = {name.removeprefix("weights/"): golden[name] for name in golden if name.startswith("weights/")}
    return from_sit(weights, num_heads=4).eval().requires_grad_(False)


def sit_flow(path: str, prediction: str, weighting: str = "None") -> Flow:
    """Return the objective that SiT's names mean."""
    return Flow(PATHS[path], PREDICTIONS[prediction], WEIGHTINGS[weighting], reversed_time=True, outputs_per_channel=2)
