"""Define the section ``evaluation`` of a config."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from core.fields import MUST_BE_GIVEN, Settings, positive


class Labels(StrEnum):
    """The labels of generated images: i modulo the number of classes, or uniform draws."""

    balanced = "balanced"
    random = "random"


@dataclass
class EvaluationSettings(Settings):
    """The settings that define how samples are measured."""

    section: ClassVar[str] = "evaluation"

    features: Any = MUST_BE_GIVEN
    reference: str | None = None  # an .npz of ADM's or of `ditscale reference`; null: all images of `source`
    source: Any = None  # of the real images, such as a test split; null: data.source
    metrics: list[str] = MUST_BE_GIVEN  # names under `metric`
    metric: Any = MUST_BE_GIVEN  # settings of each
    num_images: int = positive()
    labels: Labels = MUST_BE_GIVEN
    batch_size: int = positive()  # images of a process at once; does not affect results
    likelihood_steps: int = positive(100)  # of the ODE for the metric nll of a flow; diffusion=gaussian has its own
    seed: int = MUST_BE_GIVEN  # for the sampling noise and for random labels
    image_file: Any = MUST_BE_GIVEN  # where `ditscale evaluate` keeps the images
    cache: str = MUST_BE_GIVEN  # folder of results that are computed once: features and roots of references
