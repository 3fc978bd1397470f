"""The decisions of a SLURM task, without daemons: bash runs the batch script with a stand-in srun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_RUN, InProcess, resealed

from launch.slurm.launcher import shared, split
from launch.slurm.plan import FILE, SCRIPT, Plan, PlannedRun, ended_file, exit_code, new_folder, read_plan
from launch.slurm.script import batch_script, sbatch_options
from launch.slurm.settings import SlurmSettings
from launch.slurm.task import launched
from launch.status import RunStatus, Task, status_of
from train.standing import FILE as STATUS
from train.standing import Standing

HARD_NAME = "a $(touch pwned) 'b\" `touch pwned`; touch pwned #"


@pytest.mark.parametrize(
    ("count", "most", "max_parallel", "parts", "limits"),
    [
        (4, 1001, 2, [range(4)], [2]),
        (4, 4, None, [range(4)], [None]),
        (6, 4, 3, [range(4), range(4, 6)], [2, 1]),
        (5, 2, 4, [range(2), range(2, 4), range(4, 5)], [2, 1, 1]),
        (3, 1, 1, [range(1), range(1, 2), range(2, 3)], [1, 1, 1]),  # SLURM has no limit of 0
    ],
)
def test_arrays_hold_every_task_once_and_share_what_may_run_at_a_time(
    count: int, most: int, max_parallel: int | None, parts: list[range], limits: list[int | None]
) -> None:
    assert split(count, most) == parts
    assert shared(max_parallel, parts) == limits


def submitted(folder: Path, name: str = "run") -> tuple[Path, str]:
    """Return the folder of a submission of one run, and its token."""
    run = PlannedRun(name, ["seed=0"], str(folder / name))
    return new_folder(folder, Plan("train", str(folder), [run]))


def run_script(folder: Path, token: str, srun: str, state: str = "RUNNING", **settings: int) -> tuple[int, str]:
    """Run the batch script as task 0, with programs in place of SLURM's. Returns its exit code and its output.

    ``srun`` is what the process does, with the file for its exit code in ``$1``.
    """
    (folder / SCRIPT).write_text(batch_script(SlurmSettings(**settings), folder, token, "login"))  # type: ignore[arg-type]
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    work = {"srun": f'set -- "{ended_file(Path("$PLACE"), 0, 0)}"\n{srun}'}
    requeues = 'echo "$*" >> "$PLACE/requeued"; kill -9 $PPID'
    work["scontrol"] = f'if [ "$1" = show ]; then echo JobState={state}; else {requeues}; fi'
    for name, lines in work.items():
        (programs / name).write_text(f"#!/bin/bash\n{lines}\n")
        (programs / name).chmod(0o755)
    variables = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "7", "PLACE": str(folder)}
    env = {**os.environ, **variables, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(folder / SCRIPT), "0"], cwd=folder, env=env, capture_output=True, text=True, timeout=30
    )
    log = folder / "logs/0.log"
    return done.returncode, done.stdout + done.stderr + (log.read_text() if log.exists() else "")


@pytest.mark.parametrize(
    ("srun", "state", "code", "requeued", "said"),
    [
        ('echo 0 > "$1"', "RUNNING", 0, False, ""),
        ('echo 1 > "$1"; exit 1', "RUNNING", 1, False, "failed with exit code 1; it is not requeued"),
        ('echo 2 > "$1"; exit 2', "RUNNING", 2, False, "failed with exit code 2; it is not requeued"),
        ('echo 75 > "$1"; exit 75', "RUNNING", None, True, "was stopped and has saved; it is requeued and continues"),
        ('echo 75 > "$1"; exit 75', "CANCELLED", 75, False, "it is not requeued, since its state is CANCELLED"),
        ("kill -9 $$", "RUNNING", None, True, "died without a word, 1 of at most 3 times; it is requeued"),
        ("kill -9 $$", "CANCELLED", 1, False, "it is not requeued, since its state is CANCELLED"),
        ('echo 75 > "$1"; echo 1 > "${1%0}1"; exit 1', "RUNNING", 1, False, "failed with exit code 1"),
    ],
)
def test_the_exit_codes_of_a_tasks_processes_decide_whether_it_is_requeued(
    tmp_path: Path, srun: str, state: str, code: int | None, requeued: bool, said: str
) -> None:
    folder, token = submitted(tmp_path)
    found, shown = run_script(folder, token, srun, state)
    assert code is None or found == code, shown
    assert said in shown
    assert (folder / "requeued").exists() == requeued
    if requeued:
        assert (folder / "requeued").read_text() == "requeue 7_0\n"


def test_a_task_that_dies_too_often_is_a_failure_that_status_shows(tmp_path: Path) -> None:
    folder, token = submitted(tmp_path)
    (tmp_path / "run").mkdir()
    stand(tmp_path / "run", "running", time.time() - 10)
    run_script(folder, token, "kill -9 $$", max_crashes=1)
    assert exit_code(folder, 0) is None
    code, shown = run_script(folder, token, "kill -9 $$", max_crashes=1)
    assert code == 1
    assert "died without a word 2 times, more than hydra.launcher.max_crashes=1 allows" in shown
    assert exit_code(folder, 0) == 1
    found = status_of(tmp_path / "run", Task(folder, 0), silent_sec=900)
    assert found.state == "failed"
    assert "died without a word 2 times, more than hydra.launcher.max_crashes=1 allows" in found.reason


def test_a_save_between_two_deaths_begins_the_count_anew(tmp_path: Path) -> None:
    folder, token = submitted(tmp_path)
    for srun in ("kill -9 $$", 'echo 75 > "$1"', "kill -9 $$"):
        _, shown = run_script(folder, token, srun, max_crashes=1)
    assert shown.count("died without a word, 1 of at most 1 times; it is requeued") == 2


def test_a_node_that_sees_another_folder_runs_nothing(tmp_path: Path) -> None:
    folder, token = submitted(tmp_path)
    code, shown = run_script(folder, "0" * len(token), 'touch "$PLACE/ran"')
    assert code == 2
    assert f"does not see {folder} as it was written on login; give a sweep_dir that all nodes share." in shown
    assert not (folder / "ran").exists()


def test_no_value_is_a_command_of_the_batch_script(tmp_path: Path) -> None:
    (place := tmp_path / HARD_NAME).mkdir()
    folder, token = submitted(place)
    code, shown = run_script(folder, token, 'mkdir -p "${1%/0}"; echo 0 > "$1"')
    assert code == 0, shown
    assert not list(tmp_path.rglob("pwned"))
    options = sbatch_options(SlurmSettings(partition="p; touch pwned"), folder, "job", 4, 2)
    assert "--partition=p; touch pwned" in options  # one word of a command that no shell reads
    assert "--array=0-3%2" in options
    assert "--signal=USR2@60" in options


def test_processes_of_a_task_get_torchruns_variables_from_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("train", ".", [PlannedRun("run", [])])
    given = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    for name, value in {**given, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    ranks = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert launched(plan, 0) == {**ranks, "MASTER_ADDR": "10.0.0.1"}
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert launched(plan, 0) == {}
    assert "MASTER_PORT" not in os.environ
    shares = Plan("encode", ".", [PlannedRun("digits", [])], shares=3)
    assert [launched(shares, index)["RANK"] for index in range(3)] == ["2", "1", "0"]
    assert launched(shares, 0)["WORLD_SIZE"] == "3"


@pytest.mark.parametrize("change", ["a byte", "a field"])
def test_a_task_does_not_run_what_a_damaged_plan_says(tmp_path: Path, change: str) -> None:
    folder, _ = submitted(tmp_path)
    if change == "a byte":
        (folder / FILE).write_text((folder / FILE).read_text().replace("seed=0", "seed=1"))
    else:
        resealed(folder / FILE, runs=[{"name": "run", "words": "seed=1", "run_dir": None}])
    words = [sys.executable, "-m", "launch.slurm.task", str(folder), "0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == exit_code(folder, 0) == 2
    assert done.stderr.startswith(f"ditscale: error: {folder / FILE} is damaged: ")
    assert done.stderr.count("\n") == 1


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder, token = submitted(tmp_path, HARD_NAME)
    assert read_plan(folder).runs == [PlannedRun(HARD_NAME, ["seed=0"], str(tmp_path / HARD_NAME))]
    assert (folder / "marker").read_text() == f"{token}\n"


def test_without_slurm_one_sentence_says_so_and_nothing_is_submitted(
    tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch, digits: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    shown = in_process("train", "-m", *TINY_RUN, f"data.shards={digits}", "hydra/launcher=slurm", expect=2)
    assert shown.count("error: ") == 1
    assert "on PATH; start the sweep on a login node of a SLURM cluster, or leave out hydra/launcher=slurm." in shown


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("nodes=0", "hydra.launcher.nodes is 0, but it must be at least 1"),
        ("grace_sec=0", "hydra.launcher.grace_sec is 0, but it must be at least 1"),
        ("shares=2", "hydra.launcher.shares is 2, but tasks share the work of 1 encoding, and this is 2 of train"),
    ],
)
def test_a_setting_of_the_launcher_that_cannot_be_is_refused_before_anything_is_submitted(
    tmp_path: Path, in_process: InProcess, digits: Path, word: str, sentence: str
) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "hydra/launcher=slurm", f"hydra.launcher.{word}"]
    shown = in_process("train", "-m", *words, expect=2)
    assert sentence in shown
    assert not list(tmp_path.rglob(SCRIPT))


def stand(run: Path, state: str, time_sec: float, reason: str = "") -> None:
    run.mkdir(exist_ok=True)
    (run / STATUS).write_text("{}")
    resealed(run / STATUS, state=state, step=3, total_steps=10, time_sec=time_sec, reason=reason)
    os.utime(run / STATUS, (time_sec, time_sec))


def test_status_shows_each_state_of_a_run_by_its_files(tmp_path: Path, in_process: InProcess) -> None:
    now = time.time()
    folder, _ = new_folder(tmp_path / "s", Plan("train", ".", [PlannedRun("w", [], str(tmp_path / "s/waits"))]))
    for state in ("running", "stopped", "failed", "done"):
        stand(tmp_path / "s" / state, state, now, "loss is inf\x1b[2J" if state == "failed" else "")
    stand(tmp_path / "s/silent", "running", now - 3600)
    stand(tmp_path / "s/bad", "done", now)
    (tmp_path / "s/bad" / STATUS).write_text("{")
    shown = in_process("status", "sweep=s")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines()[:-1]}
    assert lines["running"] == "running step 3 of 10"
    assert lines["stopped"] == "stopped step 3 of 10"
    assert lines["failed"] == "failed step 3 of 10 loss is inf?[2J"
    assert lines["done"] == "done step 3 of 10"
    assert lines["waits"] == "waiting"
    assert lines["silent"].startswith("silent step 3 of 10 wrote nothing for 1:00 h")
    assert lines["bad"].startswith("unknown ")
    assert STATUS in lines["bad"]
    assert shown.splitlines()[-1].startswith("1 unknown, 1 done, 1 failed, ")
    found = [json.loads(line) for line in in_process("status", "sweep=s", "format=json").splitlines()]
    assert {RunStatus(**status).name for status in found} == lines.keys()
    assert "There are 0 runs in none" in in_process("status", "sweep=none", expect=2)
    (folder / FILE).write_text("{}")
    assert f"{folder.relative_to(tmp_path) / FILE} is damaged: " in in_process("status", "sweep=s", expect=2)


def test_a_standing_is_checked_when_it_is_read(tmp_path: Path) -> None:
    stand(tmp_path / "run", "running", 0.0)
    resealed(tmp_path / "run" / STATUS, state="asleep")
    assert "state" in status_of(tmp_path / "run", None, 900).reason
    assert Standing("done", 1, 1, 0.0).reason == ""
