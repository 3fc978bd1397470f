"""Leftover variables of a launcher give one sentence, before anything waits for processes that do not exist."""

from pathlib import Path

import pytest
from conftest import TINY_RUN, InProcess

from runtime.launched import require_sound_environment

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment", [{}, WHOLE, {"RANK": "0", "WORLD_SIZE": "1"}, {"MASTER_ADDR": "x", "MASTER_PORT": "1"}]
)
def test_what_launchers_set_and_no_launcher_at_all_are_fine(environment: dict[str, str]) -> None:
    require_sound_environment(environment)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            {"WORLD_SIZE": "4"},
            "WORLD_SIZE is 4, as if set by a launcher, but RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT",
        ),
        ({"RANK": "1"}, "RANK is 1, as if set by a launcher, but LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "unset LOCAL_RANK, or start with torchrun"),
        ({**WHOLE, "WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', but it must be a whole number of at least 1"),
        ({**WHOLE, "MASTER_PORT": "-1"}, "MASTER_PORT is '-1'"),
        ({**WHOLE, "RANK": "2"}, "RANK is 2, but it must be below WORLD_SIZE, which is 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED is true, but ditscale does not use that mode"),
        ({"ACCELERATE_USE_FSDP": "1"}, "runtime.mode=fsdp shards the state"),
        ({"ACCELERATE_DYNAMO_BACKEND": "junk"}, "runtime.compile=true compiles"),
    ],
)
def test_what_is_left_of_another_launch_is_one_sentence(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        require_sound_environment(environment)


@pytest.mark.parametrize("job", ["train", "encode"])
def test_the_command_says_it(in_process: InProcess, digits: Path, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = [*TINY_RUN, f"data.shards={digits}"] if job == "train" else ["data=digits"]
    shown = in_process(job, *words, expect=2)
    assert "WORLD_SIZE is 4, as if set by a launcher" in shown
