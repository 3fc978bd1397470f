"""Give a checkpoint the conditions of the images that a job asks for: images to enlarge, or texts."""

from dataclasses import replace
from typing import Any, Protocol

from data.low_resolution import enlarging
from data.prompts import read_prompts
from launch.builders.build import LoadedCheckpoint


class ConditionSettings(Protocol):
    """The settings of a job on what its images are conditioned on."""

    low_resolution: str | None
    prompts: Any
    negative_prompt: str | None


def conditioned(checkpoint: LoadedCheckpoint, config: ConditionSettings) -> LoadedCheckpoint:
    """Return the checkpoint with the images that it enlarges, or the texts that it draws.

    Raises ValueError where the network is conditioned on something else.
    """
    knows_null, path = checkpoint.class_dropout > 0, str(checkpoint.path)
    conditions = enlarging(checkpoint.conditions, config.low_resolution, checkpoint.spec, knows_null, path)
    return replace(
        checkpoint, conditions=conditions.prompted(read_prompts(config.prompts), config.negative_prompt, path)
    )
