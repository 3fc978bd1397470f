"""Jobs can read a run while it trains and keeps only its newest checkpoint."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY_RUN, ditscale, json_lines, warm
from warm_jobs import TRAINING

from train.signals import EX_TEMPFAIL
from train.stores import list_checkpoints


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> Iterator[Path]:
    """Yield a running job that saves after each step and deletes the checkpoint before."""
    words = [*TINY_RUN, f"data.shards={digits}", "run_dir=run", "checkpoint_every=1", "keep_checkpoints=1"]
    jobs = warm(*TRAINING).twin()  # for the readers run meanwhile
    process = jobs.start(["train", *words, "total_steps=1000000"], tmp_path, tmp_path / "log")
    while not list_checkpoints(tmp_path / "run/checkpoints"):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    yield tmp_path / "run"
    assert process.poll() is None, (tmp_path / "log").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == EX_TEMPFAIL


def newest(run: Path) -> int:
    while not (found := list_checkpoints(run / "checkpoints")):  # between two renames
        time.sleep(0.001)
    return int(found[-1].name.removeprefix("step_"))


def test_every_reader_finds_a_checkpoint_though_each_is_deleted_after_the_next(run: Path, tmp_path: Path) -> None:
    before = newest(run)
    for number in range(3):
        ditscale("sample", "checkpoint=run", "sampler.steps=2", "num_images=2", f"out=grid{number}", cwd=tmp_path)
        ditscale("export", "checkpoint=run", "to=reference", f"out=weights{number}.pt", cwd=tmp_path)
    few = ["sampler.steps=2", "evaluation.num_images=20", "evaluation.features.epochs=1", "evaluation.batch_size=10"]
    ditscale("evaluate", "checkpoint=run", "runtime=cpu", *few, cwd=tmp_path)
    assert newest(run) > before + 20  # so that whoever read one found others deleted meanwhile
    (record,) = json_lines(run / "evaluations.jsonl")
    assert before < record["step"] < newest(run)
    assert list((run / "chunks").iterdir()) == []  # those of the deleted checkpoint, whose number is on record, too
