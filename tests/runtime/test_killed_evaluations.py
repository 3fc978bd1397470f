"""Killed evaluations continue, on any number of processes."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import TINY_RUN, ditscale, json_lines, warm
from warm_jobs import TRAINING
from warm_python import run_ranks

WORDS = [
    "checkpoint=run",
    "sampler.steps=10",
    "evaluation.num_images=160",
    "evaluation.batch_size=20",
    "evaluation.features.epochs=1",
    "evaluation.metric.kernel.subset_size=50",
    "metrics=[frechet,precision_recall,kernel]",
    "runtime.device=cpu",
]


def killed_with_chunks(chunks: Path, words: list[str], cwd: Path) -> None:
    """Start a job and kill -9 it when it has finished two or more of the 8 chunks of an evaluation."""
    process = warm(*TRAINING).start(words, cwd, cwd / "log")
    deadline = time.monotonic() + 120
    while len(list(chunks.glob("*/*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(list(chunks.glob("*/*.json"))) < 8


@pytest.fixture(scope="module")
def measured(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run that was evaluated once."""
    folder = tmp_path_factory.mktemp("measured")
    ditscale("train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", "total_steps=10", cwd=folder)
    ditscale("evaluate", *WORDS, cwd=folder)
    return folder


def test_a_killed_evaluation_is_continued_by_two_processes(measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    chunks = tmp_path / "run/chunks"
    killed_with_chunks(chunks, ["evaluate", *WORDS], tmp_path)
    assert len(json_lines(tmp_path / "run/evaluations.jsonl")) == 1
    run_ranks(2, "evaluate", *WORDS, cwd=tmp_path)
    whole, continued = json_lines(tmp_path / "run/evaluations.jsonl")
    assert continued.pop("frechet_distance") == pytest.approx(whole.pop("frechet_distance"), rel=1e-9)
    for record in (continued, whole):  # of each line with its own last digits
        record.pop("record_sha256")
    assert continued == whole
    assert list(chunks.iterdir()) == []


def test_a_run_that_is_killed_while_it_evaluates_keeps_the_finished_chunks(digits: Path, tmp_path: Path) -> None:
    """Check that no chunks are left: those of another identity would still be there at the end."""
    words = ["train", *TINY_RUN, f"data.shards={digits}", "total_steps=10", "evaluate_every=10"]
    words += [word for word in WORDS if word.startswith(("sampler", "evaluation"))]
    ditscale(*words, "run_dir=whole", cwd=tmp_path)
    chunks = tmp_path / "run/chunks"
    killed_with_chunks(chunks, [*words, "run_dir=run"], tmp_path)
    assert len(list(chunks.iterdir())) == 1
    assert not (tmp_path / "run/evaluations.jsonl").exists()
    ditscale(*words, "run_dir=run", cwd=tmp_path)
    assert list(chunks.iterdir()) == []
    assert json_lines(tmp_path / "run/evaluations.jsonl") == json_lines(tmp_path / "whole/evaluations.jsonl")
