"""A run has one generator of random draws, which its record names; a run of an earlier version has numpy's."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import TINY_RUN, InProcess, json_lines, resealed

NEW = "generator=philox32_v1"


@pytest.fixture
def train(digits: Path, in_process: InProcess) -> Callable[..., str]:
    """Return a function that trains for some steps, with a checkpoint at each fifth."""

    def run(name: str, steps: int, *words: str, expect: int = 0) -> str:
        fixed = [*TINY_RUN, f"data.shards={digits}", f"run_dir={name}", "checkpoint_every=5"]
        return in_process("train", *fixed, f"total_steps={steps}", "resume.allow=[total_steps]", *words, expect=expect)

    return run


def newest_state(run: Path) -> Path:
    return max(run.glob("checkpoints/step_*/state.json"))


def weights_of(run: Path) -> bytes:
    return (newest_state(run).parent / "model.safetensors").read_bytes()


def forget_generator(run: Path) -> None:
    """Make a run look like one of an earlier version, which knew one generator only."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config.pop("generator") == "numpy"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for state in run.glob("checkpoints/step_*/state.json"):
        saved = json.loads(state.read_text())["config"]
        del saved["generator"]
        resealed(state, config=saved)


def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not_and_records_its_generator(
    train: Callable[..., str], tmp_path: Path
) -> None:
    train("whole", 10, NEW)
    train("parts", 5, NEW)
    train("parts", 10, NEW)
    train("numpys", 10)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert json_lines(tmp_path / "parts/metrics.jsonl") == json_lines(tmp_path / "whole/metrics.jsonl")
    assert weights_of(tmp_path / "numpys") != weights_of(tmp_path / "whole")
    for name, generator in (("whole", "philox32_v1"), ("numpys", "numpy")):
        assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["generator"] == generator
        assert json.loads(newest_state(tmp_path / name).read_text())["config"]["generator"] == generator


def test_a_run_keeps_its_generator(train: Callable[..., str]) -> None:
    train("run", 5, NEW)
    shown = train("run", 10, expect=2)
    assert "already holds another config: generator is 'philox32_v1' there and 'numpy' now; give this" in shown
    assert "Traceback" not in shown


def test_a_run_of_an_earlier_version_has_numpys_generator(train: Callable[..., str], tmp_path: Path) -> None:
    train("whole", 10)
    train("run", 5)
    forget_generator(tmp_path / "run")
    shown = train("run", 10, NEW, expect=2)
    assert "already holds another config: generator is 'numpy' there and 'philox32_v1' now; give this" in shown
    train("run", 10)
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_a_generator_that_does_not_exist_is_one_sentence(train: Callable[..., str]) -> None:
    shown = train("run", 5, "generator=philox32", expect=2)
    assert "generator" in shown
    assert "philox32_v1" in shown
    assert "Traceback" not in shown
