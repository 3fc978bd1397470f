"""Reconstruct averages of any width after training from those that a run kept (Karras et al. 2024, section 3.2).

An average is a weighting of the run's weights over time, p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t].
A least-squares fit approximates the wanted profile by those of the snapshots, and the snapshots are summed with the
same coefficients.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from core.records import validate
from train.checkpoint import read_state_file, read_tensors
from train.ema import MAIN, gamma_of
from train.stores import STATE_FILE

PREFIX = "width_"  # of the name of an average to be made: width_0.07


class Profile(NamedTuple):
    """The weighting of an average at a step."""

    step: int  # t
    gamma: float


def inner_product(first: Profile, second: Profile) -> float:
    """Return the integral over time of the product of two profiles.

    With t the earlier step: (g1 + 1)(g2 + 1) / (g1 + g2 + 1) x t^(g1 + g2 + 1) / (t1^(g1 + 1) t2^(g2 + 1)).
    """
    early, late = sorted((first, second))
    ratio = early.step / late.step
    powers = (early.gamma + 1) * (late.gamma + 1) / (early.gamma + late.gamma + 1)
    return float(powers * ratio**late.gamma / late.step)


def coefficients(snapshots: Sequence[Profile], wanted: Profile) -> NDArray[np.float64]:
    """Return the snapshots' coefficients in the wanted average, [num_snapshots] float64.

    They solve A x = b, where A has the inner products of the snapshots and b those with the wanted profile.
    """
    pairs = np.array([[inner_product(one, other) for other in snapshots] for one in snapshots])
    right = np.array([inner_product(one, wanted) for one in snapshots])
    scale = 1.0 / np.sqrt(np.diag(pairs))  # normalizes the profiles: those of late steps have small products
    solution = np.linalg.lstsq(pairs * scale[:, None] * scale, right * scale, rcond=1e-13)[0]
    found: NDArray[np.float64] = solution * scale
    return found


def reconstruct(checkpoints: Sequence[Path], relative_std: float) -> dict[str, Tensor]:
    """Return the average of width ``relative_std`` at the last of a run's checkpoints, by parameter name, in float32.

    Raises ValueError where the run kept no power-function averages.
    """
    widths = _kept_widths(checkpoints[-1])
    names = [MAIN, *(f"{MAIN}_{width:g}" for width in widths[1:])]
    files = [(path, name) for path in checkpoints for name in names]
    steps = [int(read_state_file(path)["step"]) for path in checkpoints]
    profiles = [Profile(step, gamma_of(width)) for step in steps for width in widths]
    shares = coefficients(profiles, Profile(steps[-1], gamma_of(relative_std)))
    total: dict[str, Tensor] = {}
    for (path, name), share in zip(files, shares.tolist(), strict=True):
        for key, value in read_tensors(path, name).items():  # one file in memory at a time
            total[key] = total.get(key, torch.zeros_like(value, dtype=torch.float64)).add_(value.double(), alpha=share)
    return {key: value.float() for key, value in total.items()}


def _kept_widths(checkpoint: Path) -> list[float]:
    """Return the widths of the averages that a run kept. Raises ValueError where it kept none."""
    section = read_state_file(checkpoint)["config"].get("ema")
    widths = section.get("relative_stds") if isinstance(section, dict) else None
    if widths is None:
        raise ValueError(
            f"{checkpoint} has averages without ema.relative_stds, from which no other width can be computed; train "
            "with train/ema=power."
        )
    return validate(list[Annotated[float, Field(gt=0, lt=1)]], widths, f"{checkpoint / STATE_FILE}, ema.relative_stds")
