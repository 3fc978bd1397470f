"""Sweeps on a real SLURM, of one node: they are preempted, killed, limited, cancelled, and end with the same bits."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import slurm_cluster
from conftest import TINY_RUN, InProcess, command, json_lines, prepared_by

pytestmark = pytest.mark.skipif(
    bool(slurm_cluster.MISSING) or os.geteuid() != 0,
    reason=f"needs root and SLURM, which `make slurm` installs from Debian; missing: {slurm_cluster.MISSING}",
)

STEPS = 400
SWEEP = [*TINY_RUN, "model.patch_size=2", f"total_steps={STEPS}", "checkpoint_every=20", "runtime=cpu"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.poll_sec=0.2", "hydra.launcher.wait=false"]
WHOLE = [
    "metrics.jsonl",
    *(f"checkpoints/step_{STEPS:08d}/{part}.safetensors" for part in ("model", "ema", "optimizer")),
]


class Cluster(NamedTuple):
    """The cluster, a folder that its node sees, shards in it, and runs that nothing disturbed."""

    folder: Path
    shards: Path
    variables: dict[str, str]

    def asked(self, *words: str) -> str:
        return subprocess.run(words, env={**os.environ, **self.variables}, capture_output=True, text=True).stdout

    def until(self, true: Callable[[], object], what: str, seconds: float = 90) -> None:
        limit = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < limit, (what, self.asked("squeue", "--array"), self.logs())
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"== {path}\n{path.read_text()}" for path in sorted(self.folder.glob("*/slurm/*/logs/*")))

    def until_idle(self, seconds: float = 90) -> None:
        self.until(lambda: not self.asked("squeue", "--noheader"), "the queue is empty", seconds)


@pytest.fixture(scope="module")
def cluster(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    (daemons := folder / "daemons").mkdir()
    with slurm_cluster.running(daemons) as variables:
        yield Cluster(folder, digits, variables)


@pytest.fixture
def submit(cluster: Cluster, in_process: InProcess, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs ``ditscale`` on the cluster's login node."""
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)

    def run(*words: str, expect: int = 0) -> str:
        monkeypatch.chdir(cluster.folder)
        return in_process(*words, expect=expect)

    return run


def sweep_words(cluster: Cluster, name: str, *more: str) -> list[str]:
    return ["train", "-m", *SWEEP, f"data.shards={cluster.shards}", f"sweep_dir={cluster.folder / name}", *more]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Path:
    """Return the runs of seeds 0 to 2 as a sweep on this machine makes them."""
    words = sweep_words(cluster, "here", "name=${seed}", "seed=0,1,2", "hydra.launcher.n_jobs=2")
    subprocess.run(command(*words), cwd=cluster.folder, check=True, capture_output=True)
    return cluster.folder / "here"


def step_of(run: Path) -> int:
    timing = run / "timing.jsonl"
    return int(json_lines(timing)[-1]["step"]) if timing.exists() and timing.read_text().endswith("\n") else 0


def files(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in WHOLE}


def process_of(index: int, rank: int = 0) -> int:
    """Return the process id of the task with this index and rank, started by srun."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            variables = (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"SLURM_PROCID={rank}".encode() not in variables:
            continue
        if b"launch.slurm.task" in words and b"srun" not in words[0] and words[-2] == str(index).encode():
            return int(place.name)
    raise AssertionError(f"no process of task {index}")


def test_an_array_that_is_killed_and_preempted_ends_as_the_sweep_on_one_machine(
    cluster: Cluster, undisturbed: Path, submit: Callable[..., str]
) -> None:
    """Check a sweep of 3, 2 at a time; one task is killed with 9, then a job of higher priority preempts both."""
    sweep = cluster.folder / "array"
    at_once = "hydra.launcher.max_parallel=2"
    shown = submit(*sweep_words(cluster, "array", *SLURM, at_once, "name=${seed}", "seed=0,1,2"))
    assert re.search(r"Submitted 3 tasks as job \d+; their output is in .*logs", shown)
    cluster.until(lambda: min(step_of(sweep / "0"), step_of(sweep / "1")) > 20, "two runs train")
    assert not (sweep / "2").exists()
    status = submit("status", f"sweep={sweep}")
    assert re.search(rf"^0  running   step \d+ of {STEPS}  [\d,]+ images/s, 0:\d\d min left$", status, re.MULTILINE)
    assert re.search(r"^2  waiting$", status, re.MULTILINE)
    assert status.endswith("2 running, 1 waiting\n")
    os.kill(process_of(0), signal.SIGKILL)
    [folder] = (sweep / "slurm").glob("*")
    cluster.until(lambda: "1 of at most 3 times; it is requeued" in (folder / "logs/0.log").read_text(), "requeued")
    words = ("sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    urgent = cluster.asked(*words).strip()
    cluster.until(lambda: not cluster.asked("squeue", "--noheader", f"--jobs={urgent}"), "the urgent job has ended")
    stopped = "the run was stopped and has saved; it is requeued and continues."
    assert sum(stopped in path.read_text() for path in (folder / "logs").glob("?.log")) >= 1
    cluster.until_idle()
    for run in ("0", "1", "2"):
        assert files(sweep / run) == files(undisturbed / run), run
    assert submit("status", f"sweep={sweep}").endswith("3 done\n")


def test_a_time_limit_requeues_a_run_that_ends_with_the_same_bits(
    cluster: Cluster, undisturbed: Path, submit: Callable[..., str]
) -> None:
    """Hold the run's process until SLURM warns it, which is some time within the last minute before the limit."""
    sweep = cluster.folder / "limited"
    limits = ["hydra.launcher.time_min=1", "hydra.launcher.grace_sec=45"]  # SLURM's limits are whole minutes
    submit(*sweep_words(cluster, "limited", *SLURM, *limits, "name=${seed}", "seed=1"))
    cluster.until(lambda: step_of(sweep / "1") > 20, "it trains")
    process = process_of(0)
    os.kill(process, signal.SIGSTOP)
    cluster.until(lambda: is_told(process, signal.SIGUSR2), "a warning comes")
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)
    cluster.until_idle()
    [log] = (sweep / "slurm").glob("*/logs/0.log")
    assert "SIGUSR2: saving, then stopping" in log.read_text()
    assert "the run was stopped and has saved; it is requeued and continues." in log.read_text()
    assert files(sweep / "1") == files(undisturbed / "1")


def is_told(process: int, number: signal.Signals) -> bool:
    """Return whether a stopped process was sent a signal, or has ended since."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return True
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_a_run_whose_node_dies_is_requeued_and_a_cancelled_one_is_not(
    cluster: Cluster, submit: Callable[..., str]
) -> None:
    sweep = cluster.folder / "cancelled"
    shown = submit(*sweep_words(cluster, "cancelled", *SLURM, "total_steps=100000", "name=${seed}", "seed=0"))
    job = re.findall(r"as job (\d+);", shown)[0]
    cluster.until(lambda: step_of(sweep / "0") > 20, "it trains")
    for program in (str(process_of(0)), *cluster.asked("pgrep", "slurmstepd").split()):
        os.kill(int(program), signal.SIGKILL)
    cluster.asked("scontrol", "update", f"NodeName={slurm_cluster.HOST}", "State=DOWN", "Reason=died")
    before = step_of(sweep / "0")
    cluster.until(lambda: step_of(sweep / "0") > before, "it continues")  # the node is back as soon as it answers
    cluster.asked("scancel", job)
    cluster.until_idle()
    [log] = (sweep / "slurm").glob("*/logs/0.log")
    assert "requeued and continues" not in log.read_text()
    status = submit("status", f"sweep={sweep}")
    assert re.search(r"^0  stopped   step \d+ of 100,000$", status, re.MULTILINE)
    assert step_of(sweep / "0") == max(line["step"] for line in json_lines(sweep / "0/timing.jsonl"))


def test_a_run_that_diverges_or_is_refused_ends_and_says_why(cluster: Cluster, submit: Callable[..., str]) -> None:
    """Check six runs in two arrays, since SLURM allows five tasks here; two of them train."""
    failing = "optimizer.lr=1e30,1e-4"
    words = ["batch_size=16,0,24", failing, "name=${batch_size}-${optimizer.lr}", "total_steps=10"]
    shown = submit(*sweep_words(cluster, "failing", *SLURM[:-1], *words), expect=1)
    assert re.search(r"Submitted 6 tasks as job \d+ and job \d+;", shown)
    assert "4 of 6 tasks failed; their output says why: " in shown
    status = submit("status", f"sweep={cluster.folder / 'failing'}")
    assert status.endswith("4 failed, 2 done\n") or status.endswith("2 done, 4 failed\n"), status
    assert "in step" in status
    assert "batch_size is 0, but it must be positive" in status
    assert not list((cluster.folder / "failing/slurm").glob("*/crashes/*"))


def test_two_processes_of_a_run_are_tasks_of_srun(
    cluster: Cluster, undisturbed: Path, submit: Callable[..., str]
) -> None:
    more = ["hydra.launcher.processes_per_node=2", "runtime=accelerate", "runtime.device=cpu", "total_steps=200"]
    words = sweep_words(cluster, "pair", *SLURM, *more, "name=${seed}", "seed=0")
    submit(*words)
    cluster.until(lambda: step_of(cluster.folder / "pair/0") > 20, "it trains")
    os.kill(process_of(0, rank=1), signal.SIGKILL)  # the other one then fails for that
    [log] = (cluster.folder / "pair/slurm").glob("*/logs/0.log")
    cluster.until(lambda: "it is requeued" in log.read_text(), "it is requeued")
    assert re.search(r"1 tasks of job \d+, .* still wait or run; wait for them, or", submit(*words, expect=2))
    cluster.until_idle()
    assert ", 2 processes, fp32" in log.read_text()
    assert "the run's process died without a word, 1 of at most 3 times; it is requeued" in log.read_text()
    one, other = (json_lines(folder / "0/metrics.jsonl")[:40] for folder in (cluster.folder / "pair", undisturbed))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in other], rel=1e-5)


def test_shares_of_an_encoding_make_the_shards_of_one_process(cluster: Cluster, submit: Callable[..., str]) -> None:
    def words(folder: str, *more: str) -> list[str]:
        return ["encode", *more, "data=digits", f"data.shards={cluster.folder / folder}"]

    prepared_by(*words("alone"), cwd=cluster.folder)
    shown = submit(*words("shared", "-m", *SLURM[:-1], "hydra.launcher.shares=2"))
    assert "Submitted 2 tasks" in shown
    assert "`ditscale status sweep=runs/encode/digits`" in shown
    found = {name: read_all(cluster.folder / name) for name in ("alone", "shared")}
    assert found["alone"] == found["shared"]


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".npz", ".json")}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["hydra.launcher.partition=gone"], "sbatch refused with exit code 1: .*[Ii]nvalid partition.*; correct"),
        (["hydra.launcher.options=[--nosuch]"], "sbatch refused with exit code .*unrecognized option.*; correct"),
    ],
)
def test_what_slurm_refuses_is_told_in_its_own_words(
    cluster: Cluster, submit: Callable[..., str], more: list[str], sentence: str
) -> None:
    assert re.search(sentence, submit(*sweep_words(cluster, "refused", *SLURM, *more, "name=${seed}"), expect=2))


def test_a_node_that_does_not_see_the_folder_trains_nothing(cluster: Cluster, submit: Callable[..., str]) -> None:
    words: Any = sweep_words(cluster, "unseen", *SLURM, "name=${seed}", "seed=0")
    cluster.asked("scontrol", "update", "PartitionName=low", "State=DOWN")
    try:
        submit(*words)
        [marker] = (cluster.folder / "unseen/slurm").glob("*/marker")
        marker.write_text("of another file system\n")
    finally:
        cluster.asked("scontrol", "update", "PartitionName=low", "State=UP")
    cluster.until_idle()
    [log] = (cluster.folder / "unseen/slurm").glob("*/logs/slurm-*.log")
    assert "does not see" in log.read_text()
    assert "give a sweep_dir that all nodes share" in log.read_text()
    assert not (cluster.folder / "unseen/0").exists()
