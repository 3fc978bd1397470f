"""An evaluation that is killed goes on where it was, on another number of processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_RUN, command, ditscale, json_lines, run_process

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
    process = subprocess.Popen(
        command(*words), cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 120
    while len(list(chunks.glob("*/*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(list(chunks.glob("*/*.json"))) < 8


def test_a_killed_evaluation_is_continued_by_two_processes(digits: Path, tmp_path: Path) -> None:
    ditscale("train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", "total_steps=10", cwd=tmp_path)
    ditscale("evaluate", *WORDS, cwd=tmp_path)
    chunks = tmp_path / "run/chunks"
    killed_with_chunks(chunks, ["evaluate", *WORDS], tmp_path)
    assert len(json_lines(tmp_path / "run/evaluations.jsonl")) == 1
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run_process([*launcher, "-m", "launch.evaluate", *WORDS], tmp_path, expect=0)
    whole, continued = json_lines(tmp_path / "run/evaluations.jsonl")
    assert continued.pop("frechet_distance") == pytest.approx(whole.pop("frechet_distance"), rel=1e-9)
    assert continued == whole
    assert list(chunks.iterdir()) == []


def test_a_run_that_is_killed_while_it_evaluates_keeps_the_finished_chunks(digits: Path, tmp_path: Path) -> None:
    """Chunks of another identity would still lie there at the end."""
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
