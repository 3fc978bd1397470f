"""Read the lines of ``evaluations.jsonl`` that figures are drawn from: check known fields, and drop all others."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue

from core.reading import DamagedFileError
from core.records import validate
from evaluation.evaluate import distance_records
from train.runfolder import RunFolder

Record = dict[str, Any]  # a line of evaluations.jsonl

_MOST_VALUES = 100  # in a setting that is a list
_MOST_STEPS = 10**6  # of a sampler
_STEPS = re.compile("[1-9][0-9]{0,6}")  # a single number; "10,5" means sections of steps


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it must be printable")
    return text


def _plain(value: JsonValue) -> JsonValue:
    """Return a setting. Raises ValueError where it is neither a scalar nor a list of scalars, as configs have."""
    values = value if isinstance(value, list) else [value]
    if len(values) > _MOST_VALUES or any(isinstance(item, list | dict) for item in values):
        raise ValueError(f"it must be one value, or a list of up to {_MOST_VALUES}")
    for item in values:
        if isinstance(item, str):
            _printable(item)
    return value


def _with_steps(sampler: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a sampler's settings. Raises ValueError for a bad name or steps, which may be text such as "ddim50"."""
    if not isinstance(sampler.get("name"), str):
        raise ValueError("it has no name")
    steps = sampler.get("steps")
    if isinstance(steps, bool | float | list) or (isinstance(steps, int) and not 1 <= steps <= _MOST_STEPS):
        raise ValueError(f"its steps must be from 1 to {_MOST_STEPS}")
    return sampler


Text = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]
Count = Annotated[int, Field(ge=0, le=2**63)]
Size = Annotated[int, Field(ge=1, le=2**31)]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Cost = Annotated[float, Field(gt=0, le=1e30)]  # positive, since it is shown on a logarithmic axis
Fraction = Annotated[float, Field(ge=0, le=1)]
Settings = dict[Text, Annotated[JsonValue, AfterValidator(_plain)]]


@dataclass(frozen=True)
class EvaluationRecord:
    """The fields of a line that the report uses. This program writes those without a default in every line."""

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
    patch_size: Size
    width: Size
    depth: Size
    block: Text
    gmacs: Cost
    parameters: Count
    training_gmacs: Annotated[float, Field(ge=0, le=1e60)]
    training_seed: int
    frechet_distance: Number
    frechet_distance_of_real_resample: Number | None
    recognized_fraction: Fraction | None
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
    sampling_gmacs: Cost | None = None  # per image; absent in lines of earlier versions


_FIELDS = {field.name: field.default is MISSING for field in fields(EvaluationRecord)}  # whether it is required


def read_records(run: RunFolder) -> list[Record]:
    """Return the lines of a run that have a distance, with those of their fields that `EvaluationRecord` defines.

    Raises ValueError, naming file, step and field, where a required field is absent, or a field has another type or is
    out of range.
    """
    return [_checked(record, run) for record in distance_records(run)]


def _checked(record: Record, run: RunFolder) -> Record:
    name, again = f"A line of step {record['step']} in {run.evaluations}", "measure again with `ditscale evaluate`"
    if absent := [key for key, needed in _FIELDS.items() if needed and key not in record]:
        raise ValueError(
            f"{name} has no {absent[0]!r}, so another program or version wrote it; remove the line and {again}."
        )
    known = {key: record[key] for key in _FIELDS if key in record}
    try:
        validate(EvaluationRecord, known, name)
    except DamagedFileError as error:
        raise DamagedFileError(f"{str(error).rstrip('.')}; remove the line and {again}.") from None
    known.setdefault("sampling_gmacs", _sampling_gmacs_of_earlier(known))
    return known


def num_sampling_steps(record: Mapping[str, Any]) -> int | None:
    """Return the sampler's number of steps where its setting is one number (50, or "ddim50"), else None."""
    steps = str(record["sampler"].get("steps", "")).removeprefix("ddim")
    return int(steps) if _STEPS.fullmatch(steps) else None


def _sampling_gmacs_of_earlier(record: Mapping[str, Any]) -> float | None:
    """Return the sampling compute of an earlier version's line, which does not state it, or None if it is unknown.

    In those versions a step of Heun's method, except the last, called the network twice; guidance doubled all calls.
    """
    steps = num_sampling_steps(record)
    if steps is None:
        return None
    calls = 2 * steps - 1 if record["sampler"]["name"] == "heun" else steps
    return float(record["gmacs"]) * calls * (1 if record["guidance"].get("name") == "unguided" else 2)
