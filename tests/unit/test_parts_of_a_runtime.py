"""Each job asks for the smallest part of a runtime that it needs, so a runtime that cannot train runs most jobs."""

import ast
from contextlib import AbstractContextManager, nullcontext
from inspect import get_annotations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess, json_lines
from test_house import FILES, ROOT

from runtime import protocol

PARTS = ("Processes", "Devices", "Runtime")
TRAINS = {
    *(f"train/{name}.py" for name in ("guards", "hooks", "loop", "replay", "saving", "step")),
    *(f"launch/{name}.py" for name in ("train", "builders/training")),
    "runtime/choice.py",  # makes runtimes
}
FEW = ["sampler.steps=2", "batch_size=8"]
FEW_MEASURED = ["sampler.steps=2", "evaluation.num_images=30", "evaluation.features.epochs=1"]


class OneProcess:
    """A single process on the CPU."""

    device = torch.device("cpu")
    is_main, data_rank, data_world = True, 0, 1

    def __init__(self, precision: str) -> None:
        assert precision == "fp32"

    def require_same(self, facts: Any) -> None:
        pass

    def together(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def wait(self) -> None:
        pass


class OneDevice(OneProcess):
    """One process with the methods that a denoiser needs."""

    num_local_devices = 1

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        return module

    put = rows = inference = lambda self, given: given

    def parts(self, batch: torch.Tensor, most: int) -> list[torch.Tensor]:
        return list(batch.split(most))

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()


def runtime(made: type) -> list[str]:
    """Return the settings that give a job a runtime without a group of its own in conf/."""
    return ["~runtime", f"+runtime={{_target_:{__name__}.{made.__name__}}}"]


def members(made: type, base: type = object) -> set[str]:
    """Return the names that a class annotates or defines beyond its base."""
    named = {name for one in made.__mro__ for name in {*vars(one), *get_annotations(one)}}
    return {name for name in named if not name.startswith("_")} - (members(base) if base is not object else set())


def named_in(path: Path) -> set[str]:
    """Return the parts of a runtime that a file imports."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    found = {alias.name for node in imports if node.module == "runtime.protocol" for alias in node.names}
    assert not any(alias.name == "protocol" for node in imports if node.module == "runtime" for alias in node.names)
    return found & set(PARTS)


@pytest.fixture
def run(digits: Path, tmp_path: Path, in_process: InProcess) -> Path:
    in_process("train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", "total_steps=2")
    return tmp_path / "run"


def test_the_third_runtime_has_the_first_two_parts_and_nothing_of_the_third() -> None:
    assert members(OneProcess) == members(protocol.Processes)
    assert members(OneDevice) == members(protocol.Devices)
    assert "prepare" in members(protocol.Runtime, protocol.Devices)


def test_only_what_trains_asks_for_a_runtime_that_trains() -> None:
    """Check that references ask for processes only, and samples and evaluations for devices too."""
    asks = {path.relative_to(ROOT).as_posix(): named_in(path) for path in FILES}
    assert {path for path, names in asks.items() if "Runtime" in names} == TRAINS
    for path in ("launch/reference.py", "evaluation/reference/file.py", "evaluation/hooks.py", "train/signals.py"):
        assert asks[path] == {"Processes"}, path
    for path in ("launch/sample.py", "launch/evaluate.py", "launch/builders/foreign.py", "evaluation/generate.py"):
        assert asks[path] == {"Devices"}, path


def test_a_reference_needs_processes_alone(tmp_path: Path, in_process: InProcess) -> None:
    words = ["reference", "data=digits", "evaluation.features.epochs=1", "num_kept=20"]
    for out, given in (("third", runtime(OneProcess)), ("cpu", ["runtime=cpu"])):
        in_process(*words, f"out={out}.npz", *given)
    assert (tmp_path / "third.npz").read_bytes() == (tmp_path / "cpu.npz").read_bytes()


def test_samples_and_evaluations_need_no_runtime_that_trains(run: Path, tmp_path: Path, in_process: InProcess) -> None:
    for out, given in (("third", runtime(OneDevice)), ("cpu", ["runtime=cpu"])):
        in_process("sample", "checkpoint=run", f"out={out}", "num_images=20", *FEW, *given)
        in_process("evaluate", "checkpoint=run", *FEW_MEASURED, *given)
    assert (tmp_path / "third.npz").read_bytes() == (tmp_path / "cpu.npz").read_bytes()
    third, cpu = json_lines(run / "evaluations.jsonl")
    assert third == cpu
    assert third["frechet_distance"] > 0
