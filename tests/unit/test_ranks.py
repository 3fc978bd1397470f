"""``ditscale launch ranks`` starts processes and keeps what their exit codes say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_RUN, InProcess, command

from launch import ranks

EXITS = "import sys, time; time.sleep(float(sys.argv[2])); sys.exit(int(sys.argv[1]))"


def started(*codes_and_seconds: tuple[int, float]) -> list["subprocess.Popen[bytes]"]:
    return [subprocess.Popen([sys.executable, "-S", "-c", EXITS, str(c), str(s)]) for c, s in codes_and_seconds]


@pytest.mark.parametrize(
    ("processes", "code"),
    [
        ([(0, 0), (0, 0.1)], 0),
        ([(75, 0), (75, 0.1)], 75),
        ([(0, 0), (75, 0.1)], 75),
        ([(2, 0), (0, 60)], 2),  # the other one is ended
        ([(75, 0), (1, 0.1)], 1),
    ],
)
def test_the_code_is_of_the_first_that_failed_else_of_one_that_was_stopped(
    processes: list[tuple[int, float]], code: int
) -> None:
    assert ranks._ended(started(*processes)) == code


def test_a_killed_process_ends_the_others() -> None:
    both = started((0, 60), (0, 60))
    both[1].kill()
    assert ranks._ended(both) == 128 + signal.SIGKILL


def test_processes_get_what_torchrun_would_set() -> None:
    given, job = ranks._parsed(["processes=4", "nodes=3", "node=2", "address=host", "--", "train", "a=b"])
    assert job == ["train", "a=b"]
    assert ranks._variables(given, 1) == {
        "MASTER_ADDR": "host",
        "MASTER_PORT": "29500",
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "12",
        "LOCAL_WORLD_SIZE": "4",
    }
    assert ranks._variables(ranks._parsed(["--", "train"])[0], 0) == {}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "There is no job; give it after --"),
        (["train"], "There is no job; give it after --"),
        (["size=2", "--", "train"], "'size=2' is not one of processes=VALUE"),
        (["processes=two", "--", "train"], "processes is 'two', but it must be a whole number"),
        (["nodes=2", "node=2", "--", "train"], "node=2 below nodes=2"),
    ],
)
def test_a_wrong_word_is_one_sentence(in_process: InProcess, words: list[str], sentence: str) -> None:
    assert sentence in in_process("launch", "ranks", *words, expect=2)
    assert "'moon' is not one of tpu and ranks" in in_process("launch", "moon", expect=2)


def test_a_run_of_two_processes_that_is_asked_to_stop_exits_with_75(digits: Path, tmp_path: Path) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "total_steps=100000", "runtime=accelerate", "runtime.device=cpu"]
    launch = command("launch", "ranks", "processes=2", f"port={20000 + os.getpid() % 9000}", "--", "train", *words)
    job = subprocess.Popen([*launch, "run_dir=run"], cwd=tmp_path)
    until = time.monotonic() + 120
    while not (tmp_path / "run/timing.jsonl").exists():
        assert job.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 1
