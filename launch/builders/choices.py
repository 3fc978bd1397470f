"""Read the sections that this project's own configs have, for jobs that choose among them while they run."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf

from diffusion.objective import Objective
from diffusion.samplers import Sampler
from launch.builders.build import require_runtime
from launch.builders.components import build, target_of
from launch.command.app import CONF

Section = Mapping[str, Any]


@functools.cache
def sections_of(group: str) -> dict[str, Section]:
    """Return the sections of a group's YAML files, such as ``diffusion/sampler``, by their names."""
    paths = sorted((CONF / group).glob("*.yaml"))
    # OmegaConf reads 1e-6 as a number, which PyYAML by itself does not.
    return {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in paths}  # type: ignore[misc]


def require_sampler(section: Section, objective: Objective, runtime: Section, device: torch.device) -> None:
    """Raise ValueError where a sampler cannot sample from the objective's networks, or not on this runtime."""
    sampler: Sampler = build(section)
    sampler.require(objective)
    require_runtime(sampler, runtime, device)


def fitting_samplers(
    first: Section, objective: Objective, runtime: Section, device: torch.device
) -> dict[str, Section]:
    """Return the samplers that fit by their names: ``first`` with its settings if it fits, then those of the configs.

    Raises ValueError, with the reason for ``first``, where none fits.
    """
    fitting: dict[str, Section] = {}
    reasons = []
    for name, section in _named(first):
        try:
            require_sampler(section, objective, runtime, device)
        except ValueError as error:
            reasons.append(error)
        else:
            fitting.setdefault(name, section)
    if not fitting:
        raise reasons[0]
    return fitting


def _named(first: Section) -> Iterator[tuple[str, Section]]:
    yield target_of(first).name, first
    # Those whose images depend on each other, since they adapt their steps to a batch, come last.
    yield from sorted(sections_of("diffusion/sampler").items(), key=lambda item: target_of(item[1]).reads_device)
