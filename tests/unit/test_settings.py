"""Settings are typed from composition to their last reader."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_house import composed

from core.fields import Settings, components, free, free_settings, positive
from launch.command.settings import SETTINGS, Precision, TrainSettings


@dataclass
class Inner(Settings):
    section = "inner"
    size: int = positive(3)
    place: str = free("here")
    part: Any = None


@dataclass
class Outer(Settings):
    inner: Inner = field(default_factory=Inner)
    precision: Precision = Precision.bf16
    network: Any = None
    logger: Any = free(None)
    often_every: int | None = positive(None)


def test_plain_values_come_back_as_they_were() -> None:
    plain = {
        "inner": {"size": 5, "place": "there", "part": {"_target_": "a.B"}},
        "precision": "fp32",
        "network": {"_target_": "a.C", "depth": 2},
        "logger": None,
        "often_every": 7,
    }
    settings = Outer.of(plain)
    assert settings.precision is Precision.fp32
    assert settings.inner.size == 5
    assert settings.plain() == plain


@pytest.mark.parametrize("job", sorted(SETTINGS))
def test_each_jobs_default_config_is_typed_and_given_back_unchanged(job: str) -> None:
    plain = composed(job)
    assert SETTINGS[job].of(plain).plain() == plain


def test_a_number_that_must_be_positive_is_refused_by_its_dotted_name() -> None:
    with pytest.raises(ValueError, match=r"inner.size is 0, but it must be positive; set it higher"):
        Outer.of({"inner": {"size": 0}})
    with pytest.raises(ValueError, match=r"often_every is -1, but it must be positive \(null is never\)"):
        Outer.of({"often_every": -1})
    assert Outer.of({"often_every": None}).often_every is None


def test_fields_say_what_a_run_may_change_and_what_decides_it() -> None:
    assert set(free_settings(Outer)) == {"inner.place", "logger"}
    assert set(components(Outer)) == {"inner.part", "network"}
    assert {"runtime", "data.shards", "evaluate_every", "evaluation"} <= set(free_settings(TrainSettings))
    assert not {"model", "seed", "batch_size", "data.flip"} & set(free_settings(TrainSettings))


def test_no_settings_are_kept_by_hand_in_a_second_place() -> None:
    """Look for dotted names of settings in quotes, a list that would be forgotten: fields are marked instead."""
    for path in sorted((Path(__file__).parents[2] / "train").glob("*.py")):
        assert '"data.' not in path.read_text(encoding="utf-8"), path
