"""Hosts of one job end together, and none waits for one that has ended."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from warm_python import TRAINING, WarmProcesses, start_warm_python

from runtime.hosts import BEAT_SEC

SCRIPT = str(Path(__file__).with_name("three_hosts.py"))
COUNT = 3


def start(folder: Path, behaviour: str) -> WarmProcesses:
    """Start three processes that have met."""
    words = (SCRIPT, str(COUNT), str(folder), behaviour)
    hosts = start_warm_python(TRAINING, *words, cwd=folder, output=folder / "codes", limit_sec=120)
    deadline = time.monotonic() + 100
    while not all((folder / f"{index}.ready").exists() for index in range(COUNT)):
        assert hosts.poll() is None, logs(folder)
        assert time.monotonic() < deadline, logs(folder)
        time.sleep(0.01)
    return hosts


def codes_of(hosts: WarmProcesses, folder: Path) -> list[int]:
    """Wait for all hosts, which end within a minute, and return their exit codes."""
    started = time.monotonic()
    assert hosts.wait() == 0, logs(folder)
    assert time.monotonic() - started < 60
    codes: list[int] = json.loads((folder / "codes").read_text().splitlines()[-1])
    return codes


def logs(folder: Path) -> list[str]:
    """Return what each host printed."""
    return [path.read_text() for path in sorted(folder.glob("*.log"))]


def test_a_host_that_is_done_waits_for_the_others(tmp_path: Path) -> None:
    assert codes_of(start(tmp_path, "finish"), tmp_path) == [0, 0, 0], logs(tmp_path)
    left = [float(shown.splitlines()[-1].split()[1]) for shown in logs(tmp_path)]
    assert max(left) - min(left) < BEAT_SEC


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [("fail", "process 1 of this job stopped with OSError: no space left on device"), ("killed", "of this job died")],
)
def test_the_others_stop_within_a_minute_with_its_error(tmp_path: Path, behaviour: str, words: str) -> None:
    hosts = start(tmp_path, behaviour)
    if behaviour == "killed":
        os.kill(int((tmp_path / "1.ready").read_text()), signal.SIGKILL)
    first, second, third = codes_of(hosts, tmp_path)
    assert first == third == 1
    assert second == (-signal.SIGKILL if behaviour == "killed" else 1)
    for index in (0, 2):
        assert words in logs(tmp_path)[index]


def test_hosts_of_different_code_all_stop_and_name_it(tmp_path: Path) -> None:
    assert codes_of(start(tmp_path, "differ"), tmp_path) == [1, 1, 1]
    for shown in logs(tmp_path):
        assert "source code is old on process 0 and new on process 2" in shown
