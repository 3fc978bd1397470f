"""Jobs run one at a time also on file systems without locks; errors name folder, errno and the way out."""

import errno
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import TINY_RUN, InProcess, prepared_by
from faulty_server import FaultyServer
from warm_python import TRAINING, run_warm_python, start_warm_python

from core.locks import HeldError, acquired, locked
from core.rooms import MAY_IMPORT, ROOT, source_files

CC = shutil.which("cc") or shutil.which("gcc")
WORDS = ["train", *TINY_RUN, "run_dir=run", "total_steps=2"]
NO_LOCKS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS]


@pytest.fixture(scope="session")
def no_locks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a library that answers flock with an error, to be preloaded."""
    if CC is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("library") / "no_locks.so"
    subprocess.run([CC, "-shared", "-fPIC", str(Path(__file__).parent / "no_locks.c"), "-o", str(library)], check=True)
    return str(library)


def run(words: list[str], cwd: Path, library: str, number: int, expect: int = 0) -> str:
    env, job = {"FLOCK_ERRNO": str(number)}, ("-m", "launch.cli", *words)
    return run_warm_python(TRAINING, *job, cwd=cwd, expect=expect, env=env, preload=library)


def of_another_host(marker: Path) -> None:
    """Write the marker that a killed job leaves there."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text("4711\nanother-host\n")


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


def test_a_stale_lock_of_another_host_names_its_file_where_a_run_or_shards_are_written(
    digits: Path, tmp_path: Path, no_locks: str
) -> None:
    for words, marker, said in [
        ([*WORDS, f"data.shards={digits}"], "run/.lock.soft", "Another process is training in run; wait for it"),
        (
            ["encode", "data=digits", "data.shards=shards"],
            "shards/.encode-0.lock.soft",
            "Another `ditscale encode` is running in shards as process 0; wait for it",
        ),
    ]:
        of_another_host(tmp_path / marker)
        shown = run(words, tmp_path, no_locks, errno.ENOLCK, expect=2)
        assert said in shown
        assert f"(if no job is running, on this machine or another, remove {marker})." in shown
        assert len(shown.strip().splitlines()) == 2, shown  # the sentence, and how to see a traceback
        (tmp_path / marker).unlink()  # as the sentence says
        run(words, tmp_path, no_locks, errno.ENOLCK)


def test_a_stale_lock_of_another_host_names_its_file_where_a_job_waits(
    digits: Path, tmp_path: Path, no_locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check every lock that jobs wait for: those of the classifier's and a reference's cache, and the report's."""
    reference = ["reference", "out=r.npz", "evaluation.features.epochs=1", "runtime=cpu"]
    measured = ["evaluate_every=2", "evaluation.num_images=8", "sampler.steps=2", "evaluation.features.epochs=1"]
    words = [*WORDS[:-2], *measured, "evaluation.reference=r.npz", f"data.shards={digits}", "sweep_dir=runs"]
    words += ["total_steps=2", "train/logger=wandb"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    prepared_by(*reference, cwd=tmp_path)
    prepared_by(*words, "run_dir=runs/one", cwd=tmp_path)
    guarded = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and "classifier-" in path.name]
    guarded += (tmp_path / "cache").rglob("*.npy")
    markers = [path.with_suffix(".lock.soft").relative_to(tmp_path) for path in guarded]
    assert {part.partition("-")[0] for path in markers for part in path.parts[1:]} >= {"classifier", "reference"}
    markers.append(Path("runs/.report.lock.soft"))
    for marker in markers:
        of_another_host(tmp_path / marker)
    job = start_warm_python(
        TRAINING,
        *("-m", "launch.cli", *words, "run_dir=runs/two"),
        cwd=tmp_path,
        output=tmp_path / "output",
        env={"FLOCK_ERRNO": str(errno.ENOLCK)},
        preload=no_locks,
    )
    (tmp_path / "output").touch()
    named: set[Path] = set()
    until = time.monotonic() + 240
    while job.poll() is None and time.monotonic() < until:
        for name in re.findall(
            r"which holds \S+ \(if no job is running.*, remove (\S+)\)\.", (tmp_path / "output").read_text()
        ):
            named.add(Path(name))
            (tmp_path / name).unlink(missing_ok=True)  # as the note says
        time.sleep(0.1)
    assert job.poll() == 0, (tmp_path / "output").read_text()
    assert named == set(markers)


def test_whoever_refuses_or_waits_takes_the_locks_words() -> None:
    """Check that every file that takes a lock which may be a marker gives the lock's hint."""
    for path in source_files(*MAY_IMPORT):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        if "SoftFileLock" in text:
            assert name == "core/locks.py"
        if "except HeldError" in text and name != "launch/command/machine.py":  # which takes the next one
            assert "{error.hint}" in text, name


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


def test_a_folder_in_place_of_a_lock_is_named(tmp_path: Path, digits: Path, in_process: InProcess) -> None:
    (tmp_path / "run/.lock").mkdir(parents=True)
    shown = in_process(*WORDS, f"data.shards={digits}", expect=2)
    assert "run/.lock is a folder, but it must be a file; remove it" in shown
