"""Give a checkpoint the conditions of the images that a job asks for: images to enlarge, or texts."""

from dataclasses import replace
from typing import Any, Protocol

from core.records import canonical_hash
from data.low_resolution import enlarging
from data.prompts import read_prompts
from launch.builders.build import LoadedCheckpoint
from launch.builders.components import target_of
from runtime.protocol import Processes


class ConditionSettings(Protocol):
    """The settings of a job on what its images are conditioned on."""

    guidance: Any
    low_resolution: str | None
    prompts: Any
    negative_prompt: str | None


def conditioned(checkpoint: LoadedCheckpoint, config: ConditionSettings, runtime: Processes) -> LoadedCheckpoint:
    """Return the checkpoint with the images that it enlarges, or the texts that it draws.

    Raises ValueError where the network is conditioned on something else, for a negative prompt that nothing would use,
    and where the processes have different texts.
    """
    knows_null, path = checkpoint.class_dropout > 0, str(checkpoint.path)
    conditions = enlarging(checkpoint.conditions, config.low_resolution, checkpoint.spec, knows_null, path)
    prompts = read_prompts(config.prompts)
    conditions = conditions.prompted(prompts, config.negative_prompt, path)
    if config.negative_prompt:
        _require_use(config.guidance, knows_null, path)
    if prompts is not None:
        runtime.require_same({"prompts": canonical_hash(list(prompts), spaced=True)})
    return replace(checkpoint, conditions=conditions)


def _require_use(guidance: Any, knows_null: bool, path: str) -> None:
    if not target_of(guidance).needs_null:
        raise ValueError(
            "negative_prompt is given, but only guidance by the null condition uses it; set "
            "diffusion/guidance=classifier_free, or leave it out."
        )
    if not knows_null:
        raise ValueError(
            f"negative_prompt is given, but {path} was trained without dropped captions, so that it cannot be guided; "
            "leave it out."
        )
