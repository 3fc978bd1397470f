"""Hosts of one job end together, and none waits for one that has ended."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.hosts import BEAT_SEC

SCRIPT = str(Path(__file__).with_name("three_hosts.py"))
COUNT = 3


def start(folder: Path, behaviour: str) -> list[subprocess.Popen[str]]:
    """Start three processes that find each other."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    hosts = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(index), str(COUNT), str(folder), behaviour],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(COUNT)
    ]
    deadline = time.monotonic() + 120
    while not all((folder / f"{index}.ready").exists() for index in range(COUNT)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return hosts


def test_a_host_that_is_done_waits_for_the_others(tmp_path: Path) -> None:
    hosts = start(tmp_path, "finish")
    ended = [host.communicate(timeout=60) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0, 0], ended
    left = [float(shown.splitlines()[-1].split()[1]) for shown, _ in ended]
    assert max(left) - min(left) < BEAT_SEC


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [("fail", "process 1 of this job stopped with OSError: no space left on device"), ("killed", "of this job died")],
)
def test_the_others_stop_within_a_minute_with_its_error(tmp_path: Path, behaviour: str, words: str) -> None:
    hosts = start(tmp_path, behaviour)
    if behaviour == "killed":
        hosts[1].kill()
    for index in (0, 2):
        _, error = hosts[index].communicate(timeout=60)
        assert hosts[index].returncode == 1
        assert words in error
    assert hosts[1].wait(timeout=60) != 0


def test_hosts_of_different_code_all_stop_and_name_it(tmp_path: Path) -> None:
    for host in start(tmp_path, "differ"):
        _, error = host.communicate(timeout=60)
        assert host.returncode == 1
        assert "source code is old on process 0 and new on process 2" in error
