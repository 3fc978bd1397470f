"""`ditscale evaluate` and evaluations during training write complete records, and use the right cached chunks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess, json_lines, prepared_by, resealed

from data.manifest import Manifest
from evaluation.chunks import ChunkStore
from evaluation.features.classifier import ClassifierFeatures
from evaluation.features.extractor import Features
from launch import evaluate as evaluate_module
from launch.builders.build import precision_of_products

FEW = ["sampler.steps=2", "evaluation.num_images=40", "evaluation.features.epochs=1", "evaluation.batch_size=10"]
EVALUATE = ["evaluate", "checkpoint=run", "runtime=cpu", *FEW]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 4 steps, with checkpoints at 2 and 4, and the classifier that evaluations train once."""
    folder = tmp_path_factory.mktemp("trained")
    prepared_by(*train(digits), cwd=folder)
    shutil.copytree(folder / "run", folder / "other")
    prepared_by("evaluate", "checkpoint=other", "runtime=cpu", *FEW, cwd=folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the trained run, to be measured."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("reference-*"))
    return tmp_path / "run"


def train(digits: Path, *more: str, steps: int = 4) -> list[str]:
    words = ["train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", "checkpoint_every=2", "train/ema=power"]
    words.append("diffusion.schedule.num_steps=100")  # each of which nll takes
    return [*words, "keep_checkpoints=3", f"total_steps={steps}", "resume.allow=[total_steps]", *more]


class Interrupted:
    """Stops jobs, as Ctrl-C would, after the features of a number of batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: float = float("inf")
        see = ClassifierFeatures.__call__

        def seen(extractor: ClassifierFeatures, images: np.ndarray) -> Features:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return see(extractor, images)

        monkeypatch.setattr(ClassifierFeatures, "__call__", seen)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    return Interrupted(monkeypatch)


def kept(run: Path) -> dict[str, int]:
    """Return the number of chunks in each folder of chunks."""
    return {path.name: len(list(path.glob("*.safetensors"))) for path in run.glob("chunks/*")}


def test_a_guide_is_recorded_by_its_weights_not_by_its_path(run: Path, digits: Path, in_process: InProcess) -> None:
    guided = ["diffusion/guidance=autoguidance", "guidance.guide=run", "guidance.scale=2"]
    checkpoint = EVALUATE[1] + "/checkpoints/step_00000002"
    words = [EVALUATE[0], checkpoint, *EVALUATE[2:], *guided]
    for steps in (4, 4, 6):
        in_process(*train(digits, steps=steps))
        in_process(*words)
    first, again, later = [line["guidance"] for line in json_lines(run / "evaluations.jsonl")]
    assert first == again
    assert {**first, "guide_hash": ""} == {**later, "guide_hash": ""}
    assert first["guide_hash"] != later["guide_hash"]


def test_a_gpu_that_multiplies_in_tf32_is_not_called_fp32() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("high", "tf32"), ("highest", "fp32")):
            torch.set_float32_matmul_precision(setting)
            assert precision_of_products("fp32", torch.device("cuda")) == expected
            assert precision_of_products("bf16", torch.device("cuda")) == "bf16"
            assert precision_of_products("fp32", torch.device("cpu")) == "fp32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_bits_per_dimension_are_recorded_with_their_data_and_precision(
    run: Path, digits: Path, in_process: InProcess
) -> None:
    words = ["metrics=[nll]", f"data.shards={digits}", "evaluation.num_images=2"]
    in_process(*EVALUATE, *words)
    in_process(*EVALUATE, *words, "precision=bf16")
    one, other = json_lines(run / "evaluations.jsonl")
    assert [line["likelihood_precision"] for line in (one, other)] == ["fp32", "bf16"]
    assert one["likelihood_data_hash"] == other["likelihood_data_hash"] == Manifest.load(str(digits)).hash


def test_an_evaluation_of_nothing_is_refused(run: Path, digits: Path, in_process: InProcess) -> None:
    assert "metrics is empty" in in_process(*EVALUATE, "metrics=[]", expect=2)
    assert "metrics is empty" in in_process(*train(digits, "evaluate_every=2", "evaluation.metrics=[]"), expect=2)
    assert not (run / "evaluations.jsonl").exists()


def test_an_average_is_recorded_with_the_steps_that_it_is_made_of(run: Path, in_process: InProcess) -> None:
    in_process(*EVALUATE, "weights=width_0.15")
    in_process(*EVALUATE)
    one, other = json_lines(run / "evaluations.jsonl")
    assert one["average_of_steps"] == [2, 4]
    assert "average_of_steps" not in other


def test_a_checkpoint_whose_autoencoder_was_replaced_is_refused(run: Path, in_process: InProcess) -> None:
    state = run / "checkpoints/step_00000004/state.json"
    content: dict[str, Any] = json.loads(state.read_text())
    resealed(state, spec={**content["spec"], "autoencoder_revision": "2"})
    for job in (EVALUATE, ["sample", "checkpoint=run", "runtime=cpu", "num_images=2", "out=x"]):
        shown = in_process(*job, expect=2)
        assert "autoencoder identity 2 (1, 1, 1.0, 0.0), but its config now points to identity 1 (1, 1" in shown


def test_a_killed_evaluation_goes_on_only_where_its_chunks_are_of_the_same(
    run: Path, in_process: InProcess, interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_after(chunks: int, *words: str) -> None:
        interrupted.left = 1 + chunks  # the reference's is the first
        in_process(*EVALUATE, *words, expect=130)

    interrupt_after(2)
    (name,) = kept(run)
    assert kept(run) == {name: 2}
    interrupt_after(1)
    assert kept(run) == {name: 3}  # went on
    for number, words in enumerate((["weights=width_0.15"], ["sampler.steps=3"], ["evaluation.batch_size=8"])):
        interrupt_after(1, *words)
        assert sorted(kept(run).values()) == [1] * (number + 1) + [3]
    monkeypatch.setattr(evaluate_module, "code_hash", lambda: "of another version")
    interrupt_after(1)
    assert sorted(kept(run).values()) == [1, 1, 1, 1, 3]

    # When the number is on record, those of the same number by other batches go, and what no job can take any more.
    monkeypatch.undo()
    monkeypatch.chdir(run.parent)
    in_process(*EVALUATE)
    assert sorted(kept(run).values()) == [1, 1]
    assert name not in kept(run)
    assert len(json_lines(run / "evaluations.jsonl")) == 1


def test_an_average_of_other_checkpoints_takes_no_chunks_of_the_former(
    run: Path, in_process: InProcess, interrupted: Interrupted
) -> None:
    interrupted.left = 2
    in_process(*EVALUATE, "weights=width_0.15", expect=130)
    for file in (run / "checkpoints/step_00000002").iterdir():
        file.unlink()
    (run / "checkpoints/step_00000002").rmdir()
    interrupted.left = 2
    in_process(*EVALUATE, "weights=width_0.15", expect=130)
    assert list(kept(run).values()) == [1, 1]


def test_chunks_of_a_checkpoint_that_is_gone_are_deleted_but_none_that_is_in_use(
    run: Path, digits: Path, in_process: InProcess, interrupted: Interrupted
) -> None:
    interrupted.left = 2
    in_process(*EVALUATE, expect=130)
    (old,) = kept(run)
    used = ChunkStore(run / "chunks", {"of": "another job"}, "evaluate-0-0")
    interrupted.left = float("inf")
    in_process(*train(digits, "keep_checkpoints=1", steps=6))
    with used.used():
        in_process(*EVALUATE)
        (left,) = kept(run)
        assert left != old
    in_process(*EVALUATE)
    assert kept(run) == {}


def test_chunks_of_training_go_when_its_settings_change_and_those_of_evaluate_stay(
    run: Path, digits: Path, in_process: InProcess, interrupted: Interrupted
) -> None:
    interrupted.left = 2
    in_process(*EVALUATE, expect=130)
    (theirs,) = kept(run)
    measured = [*FEW, "evaluate_every=2"]
    interrupted.left = 3
    in_process(*train(digits, *measured, steps=6), expect=130)
    (ours,) = kept(run).keys() - {theirs}
    assert kept(run)[ours] == 2
    interrupted.left = 2
    in_process(*train(digits, *measured, steps=6), expect=130)
    assert kept(run)[ours] == 3  # went on
    interrupted.left = 2
    in_process(*train(digits, *measured, "sampler.steps=3", steps=6), expect=130)
    (others,) = kept(run).keys() - {theirs}
    assert (others != ours, kept(run)[others]) == (True, 1)
    interrupted.left = float("inf")
    in_process(*train(digits, "evaluate_every=null", steps=6))
    assert kept(run) == {theirs: 1}
