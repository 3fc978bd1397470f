"""What a file of another program says of the diffusion process that its network was trained with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.reading import is_absent
from data.records import validate
from diffusion.process import GaussianDiffusion
from diffusion.schedules import CosineSchedule, LinearSchedule, ScaledLinearSchedule
from launch.diffusers_folder import read_json

_SCHEDULES: dict[str, type[LinearSchedule] | type[ScaledLinearSchedule]] = {
    "linear": LinearSchedule,
    "scaled_linear": ScaledLinearSchedule,
}


def notes_on_process(folder: Path, arguments: Mapping[str, Any], process: GaussianDiffusion) -> list[str]:
    """Return a sentence where weights say that they were trained with another process than the job's.

    ``folder`` may hold a scheduler of diffusers; ``arguments`` are those of the released trainer. Raises ValueError for
    a network that predicts anything but noise.
    """
    steps = arguments.get("diffusion_steps")
    if isinstance(steps, int) and steps > 0 and steps != process.num_steps:
        start, end = 1e-4 * 1000 / steps, 2e-2 * 1000 / steps  # as the released code scales them
        return [
            f"the weights were trained with {steps} diffusion steps, but diffusion.schedule has {process.num_steps}; "
            f"set diffusion.schedule.num_steps={steps} diffusion.schedule.beta_start={start:g} "
            f"diffusion.schedule.beta_end={end:g}."
        ]
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        scheduler = read_json(path)
    except OSError as error:
        if is_absent(error):
            return []
        raise
    if (kind := scheduler.get("prediction_type", "epsilon")) != "epsilon":
        raise ValueError(f"{path} says that the network predicts {kind!r}, but a DiT here predicts noise (epsilon).")
    betas = _betas(scheduler, path)
    if betas is None or len(betas) != process.num_steps or not np.allclose(betas, process.tables.betas, rtol=1e-5):
        names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
        said = ", ".join(f"{name} {scheduler[name]}" for name in names if name in scheduler)
        return [
            f"{path} is of another process ({said or 'of given betas'}) than diffusion/schedule, by which is sampled; "
            "choose the one that the weights were trained with."
        ]
    return []


def _betas(scheduler: Mapping[str, Any], path: Path) -> Sequence[float] | None:
    """Return the betas of a scheduler's config, or None for a schedule that is not known here."""
    steps = validate(int, scheduler.get("num_train_timesteps", 1000), f"num_train_timesteps of {path}")
    if scheduler.get("trained_betas") is not None:
        return validate(list[float], scheduler["trained_betas"], f"trained_betas of {path}")
    name = scheduler.get("beta_schedule", "linear")
    if name == "squaredcos_cap_v2":
        return list(CosineSchedule(steps).betas())
    if name not in _SCHEDULES:
        return None
    ends = [scheduler.get(key, default) for key, default in (("beta_start", 1e-4), ("beta_end", 2e-2))]
    start, end = (validate(float, value, f"betas of {path}") for value in ends)
    return list(_SCHEDULES[name](steps, start, end).betas())
