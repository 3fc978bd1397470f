"""A reader of a checkpoint keeps retention from deleting it, or takes the next one where that is impossible."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_training import new_state, run_steps, save

from launch.builders.runs import checkpoint_hash, pinned_sources, read_checkpoint
from launch.command.app import CONF
from train.checkpoint import read_state_file
from train.pins import STATE_FILE, CheckpointGoneError, pinned, unless_pinned
from train.runfolder import RunFolder
from train.stores import list_checkpoints

HOLD = """
import sys, time
from pathlib import Path
from train.pins import pinned
with pinned(Path(sys.argv[1])):
    print("pinned", flush=True)
    time.sleep(60)
"""


def names(folder: RunFolder) -> list[str]:
    return [path.name for path in list_checkpoints(folder.checkpoints)]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Return a run with checkpoints of the steps 3 to 6."""
    for step in range(3, 7):
        state = new_state()
        state.step = step
        save(tmp_path / "checkpoints", state)
    return RunFolder(tmp_path)


def test_retention_leaves_a_checkpoint_that_another_process_reads_and_deletes_it_when_that_is_done_or_dead(
    folder: RunFolder,
) -> None:
    oldest = folder.checkpoints / "step_00000003"
    words = [sys.executable, "-c", HOLD, str(oldest)]
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    reader = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=CONF.parent, env=environment)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "pinned\n"
    with pinned(folder.checkpoints / "step_00000004"), pinned(folder.checkpoints / "step_00000004"):
        folder.retain_checkpoints(1)
        assert names(folder) == ["step_00000003", "step_00000004", "step_00000006"]
    folder.retain_checkpoints(1)
    assert names(folder) == ["step_00000003", "step_00000006"]
    reader.kill()
    reader.wait()
    folder.retain_checkpoints(1)
    assert names(folder) == ["step_00000006"]


def test_nobody_can_begin_to_read_what_is_being_deleted(folder: RunFolder) -> None:
    path = folder.checkpoints / "step_00000003"

    def remove(checkpoint: Path) -> None:
        with pytest.raises(CheckpointGoneError, match="step_00000003 was deleted while it was read"), pinned(path):
            pass
        folder.store.abandon(0)

    unless_pinned(path, remove)
    with pinned(path):
        pass


def test_a_reader_whose_checkpoint_is_deleted_before_it_is_pinned_takes_the_next(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delete it between the opening of the file and its lock, which is the longest gap."""
    lock, seen = fcntl.flock, []

    def slow(descriptor: int, kind: int) -> None:
        if kind & fcntl.LOCK_SH and not seen:
            seen.append(kind)
            state = new_state(20)
            state.step = 7
            save(folder.checkpoints, state)
            folder.retain_checkpoints(1)
        lock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", slow)
    assert read_checkpoint(str(folder.path), lambda path: path.name) == "step_00000007"
    assert seen
    with pytest.raises(ValueError, match=r"There is no checkpoint folder .*step_00000006"):
        read_checkpoint(str(folder.checkpoints / "step_00000006"), read_state_file)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_locks_a_reader_takes_the_next_checkpoint(
    number: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    steps = []

    def read(path: Path) -> int:
        """Read at half the speed of the run."""
        step = int(read_state_file(path)["step"])
        steps.append(step)
        if step < 8:
            state = new_state(20)
            state.step = step + 1
            save(folder.checkpoints, state)
            folder.retain_checkpoints(1)
        return int(read_state_file(path)["step"])

    assert read_checkpoint(str(folder.path), read) == 8
    assert steps == [6, 7, 8]


def test_a_reader_that_is_slower_than_retention_for_ever_ends_with_one_sentence(folder: RunFolder) -> None:
    calls = []

    def vanish(path: Path) -> None:
        calls.append(path)
        path.rename(path.with_name(f"step_{100 + len(calls):08d}"))
        raise FileNotFoundError(path)

    with pytest.raises(ValueError, match=r"deleted its newest checkpoint 20 times while it was read; train it with a"):
        read_checkpoint(str(folder.path), vanish)
    assert len(calls) == 20
    with pytest.raises(CheckpointGoneError, match="step_00000003 was deleted while it was read"):
        read_checkpoint(str(folder.checkpoints / "step_00000003"), vanish)


def test_an_error_of_a_checkpoint_that_is_there_is_raised_at_once(folder: RunFolder) -> None:
    calls = []

    def fail(path: Path) -> None:
        calls.append(path)
        raise ValueError("damaged")

    for where in (folder.path, folder.checkpoints / "step_00000003", folder.checkpoints / "step_00000001"):
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(str(where), fail)
    assert len(calls) == 3


def test_a_checkpoint_without_a_state_file_or_with_a_pipe_in_its_place_is_left_to_its_reader(folder: RunFolder) -> None:
    path = folder.checkpoints / "step_00000003"
    (path / STATE_FILE).unlink()
    os.mkfifo(path / STATE_FILE)
    for _ in range(2):
        with pinned(path):
            pass
        (path / STATE_FILE).unlink(missing_ok=True)
    folder.retain_checkpoints(1)
    assert names(folder) == ["step_00000006"]


def test_the_checkpoints_that_an_average_is_made_of_are_pinned_together(folder: RunFolder) -> None:
    last = folder.checkpoints / "step_00000005"
    with pinned(last), pinned_sources(last, "width_0.1") as sources:
        assert [path.name[-1] for path in sources] == ["3", "4", "5"]
        folder.retain_checkpoints(1)
        assert len(names(folder)) == 4
    with pinned(last), pinned_sources(last, "ema") as sources:
        assert sources == [last]
        folder.retain_checkpoints(1)
        assert names(folder) == ["step_00000005", "step_00000006"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_a_checkpoint_of_another_user_in_a_folder_that_nobody_may_write_to_is_read(folder: RunFolder) -> None:
    for path in [folder.path, *folder.path.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for above in folder.path.parents[:-2]:
        above.chmod(0o755)
    expected = checkpoint_hash(folder.checkpoints / "step_00000006")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setuid(65534)
            code = 0 if read_checkpoint(str(folder.path), checkpoint_hash) == expected else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_readers_of_a_run_that_keeps_one_checkpoint_never_fail(tmp_path: Path) -> None:
    """Read in threads, each of which has a pin of its own, since each opens the file itself."""
    folder, ended = RunFolder(tmp_path), threading.Event()
    run_steps(new_state(10**6), folder, 2, every=1)

    def train() -> None:
        state = new_state(10**6)
        while not ended.is_set():
            state.step = max(folder.store.steps()) + 1
            save(folder.checkpoints, state)
            folder.retain_checkpoints(1)

    def read(path: Path) -> int:
        time.sleep(0.1)
        return sum(len(file.read_bytes()) for file in path.iterdir()) + read_state_file(path)["step"]

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        sizes = [read_checkpoint(str(tmp_path), read) for _ in range(20)]
    finally:
        ended.set()
        trainer.join()
    assert all(size > 0 for size in sizes)
    folder.retain_checkpoints(1)
    assert len(folder.store.steps()) == 1
    assert folder.store.steps()[0] > 10
