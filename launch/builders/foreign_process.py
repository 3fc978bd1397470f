"""Read the diffusion process that a network of another program was trained with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from core.reading import is_absent
from core.records import validate
from diffusion.objective import Objective
from diffusion.process import GaussianDiffusion
from diffusion.schedules import CosineSchedule, LinearSchedule, ScaledLinearSchedule
from launch.builders.diffusers_folder import read_json
from model.diffusers_weights import PREDICTION_TYPES


@dataclass
class SchedulerConfig:
    """The fields of ``scheduler_config.json`` that decide the process, with diffusers' defaults."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    trained_betas: list[float] | None = None
    prediction_type: str = "epsilon"


_FIELDS = tuple(field.name for field in fields(SchedulerConfig))


def notes_on_process(folder: Path, arguments: Mapping[str, Any], objective: Objective) -> list[str]:
    """Return a sentence where weights state that they were trained with another process than the job's.

    ``folder`` may have a diffusers scheduler; ``arguments`` are those of the released trainer. Raises ValueError where
    the scheduler says that the network predicts another quantity than the objective has.
    """
    steps, process = arguments.get("diffusion_steps"), objective
    if not isinstance(process, GaussianDiffusion):
        return [] if steps is None else [f"the weights were trained with diffusion=gaussian, not {objective.name}."]
    if isinstance(steps, int) and steps > 0 and steps != process.num_steps:
        start, end = 1e-4 * 1000 / steps, 2e-2 * 1000 / steps  # as the released code scales them
        return [
            f"the weights were trained with {steps} diffusion steps, but diffusion.schedule has {process.num_steps}; "
            f"set diffusion.schedule.num_steps={steps} diffusion.schedule.beta_start={start:g} "
            f"diffusion.schedule.beta_end={end:g}."
        ]
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        content = read_json(path)
    except OSError as error:
        if is_absent(error):
            return []
        raise
    said = {name: content[name] for name in _FIELDS if name in content}
    config = validate(SchedulerConfig, said, str(path))
    names = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    if (predicted := names.get(config.prediction_type)) != (ours := process.parameterization.name):
        follow = "give other weights" if predicted is None else f"set diffusion/prediction={predicted}"
        raise ValueError(
            f"{path} says that the network predicts {config.prediction_type!r:.100}, but the objective has "
            f"diffusion/prediction={ours}; {follow}."
        )
    if not _same(_betas(config), process):
        shown = ", ".join(f"{name} {value}" for name, value in said.items() if name != "trained_betas")
        return [
            f"{path} has another process ({shown}) than diffusion/schedule, which is used to sample; choose the "
            "schedule that the weights were trained with."
        ]
    return []


def _betas(config: SchedulerConfig) -> Sequence[float] | None:
    """Return the betas of a scheduler's config, or None for an unknown schedule."""
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return config.trained_betas
    try:
        if config.beta_schedule == "squaredcos_cap_v2":
            return list(CosineSchedule(steps).betas())
        if config.beta_schedule == "linear":
            return list(LinearSchedule(steps, config.beta_start, config.beta_end).betas())
        if config.beta_schedule == "scaled_linear":
            return list(ScaledLinearSchedule(steps, config.beta_start, config.beta_end).betas())
    except ValueError:  # betas outside (0, 1)
        return None
    return None


def _same(betas: Sequence[float] | None, process: GaussianDiffusion) -> bool:
    if betas is None or len(betas) != process.num_steps:
        return False
    return bool(np.allclose(betas, process.tables.betas, rtol=1e-5))
