"""The step at which a run diverged gives the same report under any runtime and sharding."""

import re
from pathlib import Path

import pytest
from conftest import TINY_RUN, InProcess, ditscale
from poisoned_shards import poisoned
from warm_python import FAST_COMPILE, run_ranks

POSITION = 16 * 11 + 13  # in step 12, after the checkpoint of step 10; among two processes, in the second's rows
DUMP = "replay=run/nonfinite_00000012"


def findings(shown: str) -> list[str]:
    """Return the report without its numbers, which are rounded differently elsewhere."""
    assert re.search(rf"\n  position {POSITION}: image digit-\d+, label \d.*, loss nan, largest \|x_0\| inf\n", shown)
    return re.findall(r"(?:samples|outputs of modules|norms of .*): \d+.*", shown)


@pytest.fixture
def alone(digits: Path, tmp_path: Path, in_process: InProcess) -> list[str]:
    """Return what one process finds in the dump that it made."""
    poisoned(digits, tmp_path / "shards", POSITION)
    in_process("train", *TINY_RUN, "data.shards=shards", "run_dir=run", "model.depth=1", expect=1)
    return findings(in_process("train", DUMP))


def test_two_sharded_processes_and_sharded_xla_devices_find_what_one_process_finds(
    alone: list[str], tmp_path: Path
) -> None:
    assert len(alone) == 4
    assert "the first is patch_embedding" in alone[1]
    together = run_ranks(2, "train", DUMP, "runtime.mode=fsdp", "runtime.micro_batches=2", cwd=tmp_path)
    assert findings(together) == alone
    xla = [DUMP, "runtime=xla", "runtime.cpu_devices=4", "runtime.mode=fsdp"]
    assert findings(ditscale("train", *xla, cwd=tmp_path, env=FAST_COMPILE)) == alone
