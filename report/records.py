"""Read the lines of ``evaluations.jsonl`` that figures are drawn from: check known fields, drop all others."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue

from core.reading import DamagedFileError
from core.records import printable, validate
from evaluation.evaluate import distance_records
from evaluation.recognition import MOST_PROMPTS
from train.runfolder import RunFolder

Record = dict[str, Any]  # a line of evaluations.jsonl
DISTANCE = "frechet_distance"

_MOST_VALUES = 100  # in a setting that is a list
_MOST_STEPS = 10**6  # of a sampler
_STEPS = re.compile("[1-9][0-9]{0,6}")  # one number of steps; a respacing such as "10,5" does not match


def _plain(value: JsonValue) -> JsonValue:
    """Return a setting. Raises ValueError unless it is a scalar or a list of scalars, as in configs."""
    values = value if isinstance(value, list) else [value]
    if len(values) > _MOST_VALUES or any(isinstance(item, list | dict) for item in values):
        raise ValueError(f"it must be one value, or a list of up to {_MOST_VALUES}")
    for item in values:
        if isinstance(item, str):
            printable(item)
    return value


def _with_steps(sampler: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a sampler's settings. Raises ValueError for a wrong name or steps, which may be text such as "ddim50"."""
    if not isinstance(sampler.get("name"), str):
        raise ValueError("it has no name")
    steps = sampler.get("steps")
    if isinstance(steps, bool | float | list) or (isinstance(steps, int) and not 1 <= steps <= _MOST_STEPS):
        raise ValueError(f"its steps must be from 1 to {_MOST_STEPS}")
    return sampler


Text = Annotated[str, Field(max_length=1000), AfterValidator(printable)]
Count = Annotated[int, Field(ge=0, le=2**63)]
Size = Annotated[int, Field(ge=1, le=2**31)]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Cost = Annotated[float, Field(gt=0, le=1e30)]  # above 0, since its logarithm is shown
Fraction = Annotated[float, Field(ge=0, le=1)]
Settings = dict[Text, Annotated[JsonValue, AfterValidator(_plain)]]


@dataclass(frozen=True)
class PromptCount:
    """The number of images of one prompt, and of those that are recognized as the class that it asks for."""

    prompt: Text
    label: Count
    images: Size
    recognized: Count
    held_out: bool | None  # whether no caption of the training data equals it; None: not known

    def __post_init__(self) -> None:
        if self.recognized > self.images:
            raise ValueError(f"{self.recognized} of {self.images} images are recognized")


@dataclass(frozen=True)
class EvaluationRecord:
    """The fields of a line that the report uses. Those without a default are in every line of this program."""

    step: Count
    images_seen: Count
    weights: Text
    sampler: Annotated[Settings, AfterValidator(_with_steps)]
    guidance: Settings
    num_images: Size
    labels: Text
    sampling_seed: int
    network_precision: Text
    decoder: Text
    feature_extractor: Text
    feature_extractor_hash: Text
    reference: Text
    reference_hash: Text
    gmacs: Cost
    parameters: Count
    training_gmacs: Annotated[float, Field(ge=0, le=1e60)]
    training_seed: int
    frechet_distance: Number
    frechet_distance_of_real_resample: Number | None
    recognized_fraction: Fraction | None
    objective: Settings | None = None  # absent in lines of earlier versions
    family: Text = "DiT"  # the rest of the network's shape is absent where it does not apply
    size: Text = ""
    patch_size: Size = 1
    width: Size = 1
    depth: Size = 1
    block: Text = ""
    evaluated_by: Text | None = None
    reference_images: Count | None = None
    classifier_accuracy: Fraction | None = None
    metrics: dict[Text, Settings] | None = None
    fid: Number = 0.0
    sfid: Number | None = None
    inception_score: Number | None = None
    precision: Number | None = None
    recall: Number | None = None
    kernel_distance: Number | None = None
    kid: Number | None = None
    clip_score: Number | None = None
    captions_hash: Text | None = None  # absent where images have no captions
    recognized_by_prompt: Annotated[list[PromptCount], Field(max_length=MOST_PROMPTS)] | None = None
    sampling_gmacs: Cost | None = None  # of one image; absent in lines of earlier versions


_FIELDS = {field.name: field.default is MISSING for field in fields(EvaluationRecord)}  # whether each is required
_OF_EARLIER = ("patch_size", "width", "depth", "block")  # in each line without a family: earlier versions had DiT alone
_BLOCKS_OF_EARLIER = {
    "AdaLNZeroBlock": "adaLN-Zero",
    "AdaLNBlock": "adaLN",
    "CrossAttentionBlock": "cross-attention",
    "InContextBlock": "in-context",
}


def read_records(run: RunFolder) -> list[Record]:
    """Return the lines of a run that have a distance, with their fields of `EvaluationRecord`.

    Raises ValueError that names file, step and field where a required field is missing, or a field has another type or
    a value that cannot be measured.
    """
    return [checked(record, run.evaluations) for record in distance_records(run)]


def checked(record: Record, file: Path) -> Record:
    """Return the fields of `EvaluationRecord` of one line of a file. Raises ValueError as `read_records` does."""
    name, again = f"A line of step {record['step']} in {file}", "measure again with `ditscale evaluate`"
    needed = [key for key, is_needed in _FIELDS.items() if is_needed]
    needed += () if "family" in record else _OF_EARLIER
    if absent := [key for key in needed if key not in record]:
        raise ValueError(
            f"{name} has no {absent[0]!r}, so another program or version wrote it; remove the line and {again}."
        )
    known = {key: record[key] for key in _FIELDS if key in record}
    try:
        validate(EvaluationRecord, known, name)
    except DamagedFileError as error:
        raise DamagedFileError(f"{str(error).rstrip('.')}; remove the line and {again}.") from None
    known.setdefault("sampling_gmacs", _sampling_gmacs_of_earlier(known))
    if "family" not in known:
        known |= {"family": "DiT", "block": _BLOCKS_OF_EARLIER.get(known["block"], known["block"])}
    return known


def num_sampling_steps(record: Mapping[str, Any]) -> int | None:
    """Return the sampler's steps if its setting is one number (50 for 50 and for "ddim50"), else None."""
    steps = str(record["sampler"].get("steps", "")).removeprefix("ddim")
    return int(steps) if _STEPS.fullmatch(steps) else None


def num_calls(record: Mapping[str, Any]) -> float | None:
    """Return how often sampling called the network for an image, guidance included, or None if that is unknown."""
    cost = record["sampling_gmacs"]
    return None if cost is None else round(cost / record["gmacs"], 3)


def _sampling_gmacs_of_earlier(record: Mapping[str, Any]) -> float | None:
    """Return the sampling cost of a line of an earlier version, which did not record it, or None if unknown.

    In these versions each step of Heun's method except the last called the network twice, and any guidance doubled the
    calls.
    """
    steps = num_sampling_steps(record)
    if steps is None:
        return None
    calls = 2 * steps - 1 if record["sampler"]["name"] == "heun" else steps
    return float(record["gmacs"]) * calls * (1 if record["guidance"].get("name") == "unguided" else 2)
