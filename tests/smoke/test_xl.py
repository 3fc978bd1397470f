"""The short form of ``benchmarks.xl_step`` works: one block of the paper's largest model."""

import json
import sys

from conftest import run_process

from launch.command.app import CONF


def test_a_block_of_xl_2_runs_forward_and_backward_in_bf16() -> None:
    words = [sys.executable, "-m", "benchmarks.xl_step", "1"]
    result = json.loads(run_process(words, CONF.parent, expect=0).splitlines()[-1])
    assert result["finite"]
    assert result["peak_memory_bytes"] < 24e9
