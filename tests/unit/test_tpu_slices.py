"""``ditscale launch tpu`` on a stand-in for gcloud, whose slices are folders of this machine."""

import os
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY_RUN, InProcess

from launch.tpu.gcloud import Gcloud
from launch.tpu.hosts import pack, starting
from launch.tpu.settings import parsed

# It keeps a slice as STATE/NAME/state and STATE/NAME/worker-N, the home folders of its hosts. A file STATE/preempt
# makes the next connection to a running job end with the slice, once that file's text is in the job's log.
GCLOUD = r"""#!{python}
import os, pathlib, shutil, signal, subprocess, sys, time
state = pathlib.Path({state!r})
words = sys.argv[1:]
with open(state / "calls", "a") as file:
    file.write(" ".join(words) + "\n")
if (state / "refusal").exists():
    print((state / "refusal").read_text(), file=sys.stderr)
    sys.exit(1)
kind, verb, name = words[2:5]
given = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
place = state / name.split(":")[0]
if verb == "create":
    for number in range({hosts}):
        (place / f"worker-{{number}}").mkdir(parents=True)
    (place / "state").write_text("READY")
elif verb == "describe":
    if not place.exists():
        print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
        sys.exit(1)
    print((place / "state").read_text())
elif verb == "delete":
    shutil.rmtree(place)
elif verb == "scp":
    place = state / words[5].split(":")[0]
    for home in place.glob("worker-*"):
        shutil.copy(words[4], home / words[5].split(":")[1])
elif verb == "ssh":
    homes = sorted(place.glob("worker-*"))
    for home in homes if given["worker"] == "all" else homes[:1]:
        job = subprocess.Popen(["sh", "-c", given["command"]], cwd=home, env={{**os.environ, "HOME": str(home)}})
        mark = state / "preempt"
        while job.poll() is None:
            log = home / "ditscale/run.log"
            if "tail" in given["command"] and mark.exists() and log.exists() and mark.read_text() in log.read_text():
                mark.unlink()
                os.kill(int((homes[0] / "ditscale/run.pid").read_text()), signal.SIGKILL)
                (place / "state").write_text("PREEMPTED")
                job.kill()
                sys.exit(255)
            time.sleep(0.05)
        if job.returncode:
            sys.exit(job.returncode)
"""
SLICE = ["name=pod", "zone=us-central2-b"]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stand-in for gcloud on PATH; return the folder of its slices."""
    state, programs = tmp_path / "cloud", tmp_path / "bin"
    state.mkdir()
    programs.mkdir()
    gcloud = programs / "gcloud"
    gcloud.write_text(GCLOUD.format(python=sys.executable, state=str(state), hosts=2))
    gcloud.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return state


def program(folder: Path, text: str) -> str:
    """Return the path of a shell script, in place of ``ditscale`` on the hosts."""
    path = folder / "program.sh"
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return str(path)


def calls(cloud: Path) -> list[str]:
    """Return gcloud's calls, as its kind of resource and its verb."""
    return [" ".join(line.split()[2:4]) for line in (cloud / "calls").read_text().splitlines()]


def launch(in_process: InProcess) -> Callable[..., str]:
    return lambda *words, expect=0: in_process("launch", "tpu", *words, expect=expect)


def test_a_preempted_slice_is_created_again_and_the_run_continues(
    cloud: Path, digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    """Check a real training: killed with its slice, it continues on the next one from its checkpoints."""
    host = '"$(basename "$(dirname "$PWD")")"'
    ditscale = program(
        tmp_path, f'[ {host} = worker-0 ] || exit 0\nexec {sys.executable} -m launch.cli "$@" name={host}\n'
    )
    (cloud / "preempt").write_text("starts")
    job = ["train", *TINY_RUN, f"data.shards={digits}", f"sweep_dir={tmp_path / 'bucket'}", "total_steps=60"]
    more = ["type=v3-16", "install=true", f"program={ditscale}", "poll_sec=0.01"]
    shown = launch(in_process)(*SLICE, *more, "--", *job)
    assert "The slice is PREEMPTED; it is deleted and created again." in shown
    assert re.search(r"worker-0: step 60, loss", shown)
    verbs = [call.split()[1] for call in calls(cloud)]
    assert [verb for verb in verbs if verb in ("create", "delete", "scp")] == [
        "create",
        "scp",
        "delete",
        "create",
        "scp",
    ]
    assert "note: without remote_dir=gs://..., a preempted slice takes the run folder with it." in shown


def test_exit_code_75_starts_the_job_again_and_any_other_ends_it(
    cloud: Path, tmp_path: Path, in_process: InProcess
) -> None:
    counting = program(
        tmp_path, 'echo "start: $*"; echo x >> starts; [ "$(wc -l < starts)" -lt 3 ] && exit 75; exit 7\n'
    )
    words = ["type=v3-16", "install=true", f"program={counting}", "poll_sec=0.01", "--", "train", "it's=$HOME"]
    shown = launch(in_process)(*SLICE, *words, expect=7)
    assert shown.count("start: train it's=$HOME") >= 3  # nothing of it was read by a shell
    assert shown.count("The job was stopped and has saved; it is started again.") == 2
    assert [call for call in calls(cloud) if call.endswith("create")] == ["tpu-vm create"]
    assert all((host / "ditscale/launch/cli.py").exists() for host in (cloud / "pod").glob("worker-*"))
    launch(in_process)("delete", *SLICE)
    assert not (cloud / "pod").exists()


def test_a_job_survives_its_connection_and_is_stopped_by_name(
    cloud: Path, tmp_path: Path, in_process: InProcess
) -> None:
    waiting = program(tmp_path, 'trap "echo saved; exit 75" TERM; echo begun; while :; do sleep 0.05; done\n')
    (cloud / "pod/worker-0/ditscale").mkdir(parents=True)
    (cloud / "pod/state").write_text("READY")
    settings = parsed("start", [*SLICE, "type=v3-16", f"program={waiting}"])
    gcloud = Gcloud(settings)
    gcloud.run(starting("ditscale", waiting, ["train"]))
    gcloud.run(starting("ditscale", waiting, ["train"]))  # it runs already
    log = cloud / "pod/worker-0/ditscale/run.log"
    while "begun" not in log.read_text():
        pass
    launch(in_process)("stop", *SLICE)
    shown = launch(in_process)("logs", *SLICE)
    assert "saved" in shown
    assert shown.count("begun") == 1


def test_a_dry_run_prints_the_calls_and_makes_none(
    tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    shown = launch(in_process)(*SLICE, "type=v3-128", "spot=true", "dry_run=true", "--", "train", "remote_dir=gs://b/r")
    for part in (
        "tpu-vm describe pod",
        "tpu-vm create pod",
        "--spot",
        "tpu-vm scp",
        "--worker=all",
        "setsid nohup",
        "--zone=us-central2-b",
    ):
        assert part in shown
    assert "remote_dir=gs://b/r" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name is missing; give it as name=VALUE"),
        (SLICE, "type is missing; give it as type=VALUE"),
        ([*SLICE, "type=v3-8"], "There is no job; give it after --"),
        ([*SLICE, "tipe=v3-8"], "has no setting 'tipe'; did you mean 'type'"),
        ([*SLICE, "type=v3-8", "train"], "'train' is not NAME=VALUE; put the command for the slice after --"),
        ([*SLICE, "type=v3-8", "spot=maybe"], "spot is 'maybe', but it must be true or false"),
        ([*SLICE, "type=v3-8", "poll_sec=soon"], "poll_sec is 'soon', but it must be a number"),
        ([*SLICE, "type=v3-8", "name=two"], "name is given twice, as 'pod' and 'two'"),
        (["name=Pod", "zone=z", "type=t"], "name is 'Pod', but a slice's name"),
        (["name=pod", "zone=z; rm", "type=t"], "zone is 'z; rm', but it has letters"),
        (["name=pod", "zone=z", "type=t", "folder=../x"], "folder is '../x', but it is a path below"),
    ],
)
def test_a_wrong_word_is_one_sentence(cloud: Path, in_process: InProcess, words: list[str], sentence: str) -> None:
    assert sentence in launch(in_process)(*words, expect=2)
    assert not (cloud / "calls").exists()


def test_what_gcloud_refuses_is_told_in_its_own_words(cloud: Path, in_process: InProcess) -> None:
    (cloud / "refusal").write_text("ERROR: (gcloud.auth) You do not currently have an active account selected.")
    shown = launch(in_process)(*SLICE, "type=v3-8", "--", "train", expect=2)
    assert (
        "failed with exit code 1: ERROR: (gcloud.auth) You do not currently have an active account selected." in shown
    )


def test_without_gcloud_one_sentence_says_what_to_install(
    tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "There is no gcloud on PATH; install" in launch(in_process)(*SLICE, "type=v3-8", "--", "train", expect=2)


def test_the_archive_has_the_code_and_nothing_of_runs_or_caches(tmp_path: Path) -> None:
    with tarfile.open(pack(tmp_path)) as archive:
        names = archive.getnames()
    assert {"setup.cfg", "launch/cli.py", "conf/train.yaml"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.split("/")[0] in ("tests", "runs", ".git")]
