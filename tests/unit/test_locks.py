"""File systems without locks: jobs run all the same, one at a time; errors name folder, errno and the way out."""

import errno
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import TINY_RUN, ditscale
from faulty_server import FaultyServer
from warm_python import TRAINING, run_warm_python

from core.locks import HeldError, acquired, locked

CC = shutil.which("cc") or shutil.which("gcc")
WORDS = ["train", *TINY_RUN, "run_dir=run", "total_steps=2"]
NO_LOCKS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS]


@pytest.fixture(scope="session")
def no_locks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that answers flock with an error, to be preloaded."""
    if CC is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("library") / "no_locks.so"
    subprocess.run([CC, "-shared", "-fPIC", str(Path(__file__).parent / "no_locks.c"), "-o", str(library)], check=True)
    return str(library)


def run(words: list[str], cwd: Path, library: str, number: int, expect: int = 0) -> str:
    env, job = {"FLOCK_ERRNO": str(number)}, ("-m", "launch.cli", *words)
    return run_warm_python(TRAINING, *job, cwd=cwd, expect=expect, env=env, preload=library)


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_run_on_a_file_system_without_locks_trains_one_job_at_a_time(
    digits: Path, tmp_path: Path, no_locks: str, number: int
) -> None:
    words = [*WORDS, f"data.shards={digits}"]
    marker = tmp_path / "run/.lock.soft"
    marker.parent.mkdir()
    marker.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")  # this process's, which lives
    shown = run(words, tmp_path, no_locks, number, expect=2)
    assert "Another process is training in run; wait for it" in shown
    assert "remove run/.lock.soft" in shown
    if number == NO_LOCKS[0]:
        marker.unlink()
        run(words, tmp_path, no_locks, number)
        assert not marker.exists()


def test_encoding_and_evaluating_need_no_locks(tmp_path: Path, no_locks: str) -> None:
    run(["encode", "data=digits"], tmp_path, no_locks, errno.ENOLCK)
    measured = ["evaluate_every=2", "evaluation.num_images=8", "sampler.steps=2", "evaluation.features.epochs=1"]
    words = [*WORDS, *measured, "sweep_dir=runs", "run_dir=runs/one"]
    assert "Frechet distance" in run(words, tmp_path, no_locks, errno.EOPNOTSUPP)


def test_a_cache_of_remote_shards_needs_locks_and_says_so(digits: Path, tmp_path: Path, no_locks: str) -> None:
    with FaultyServer(digits).running() as server:
        shown = run([*WORDS, f"data.shards={server.url}"], tmp_path, no_locks, errno.ENOLCK, expect=2)
    assert "cache/shards does not support locks (ENOLCK: No locks available)" in shown
    assert "choose a folder on a file system that has them, such as a local disk" in shown


def test_a_lock_is_one_processs_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "folder/.lock"
    with locked(path), pytest.raises(HeldError):
        acquired(path, timeout_sec=0)
    acquired(path, timeout_sec=0).release()


def test_a_folder_in_place_of_a_lock_is_named(tmp_path: Path, digits: Path) -> None:
    (tmp_path / "run/.lock").mkdir(parents=True)
    shown = ditscale(*WORDS, f"data.shards={digits}", cwd=tmp_path, expect=2)
    assert "run/.lock is a folder, but it must be a file; remove it" in shown
