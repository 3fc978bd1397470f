"""Processes of a sweep on one machine use different GPUs. The assignment is tested without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.command import machine


def test_each_process_takes_a_gpu_of_its_own_and_leaves_it_when_it_ends(tmp_path: Path) -> None:
    leases = [machine.lease(2, tmp_path) for _ in range(4)]
    assert [gpu for gpu, _ in leases] == [0, 1, 0, 1]  # four processes share two
    leases[1][1].release()
    assert machine.lease(2, tmp_path)[0] == 1


@pytest.mark.parametrize(
    ("count", "config", "variables", "taken"),
    [
        (2, {"runtime": {"device": "auto"}}, {}, [1]),
        (2, {}, {}, [1]),
        (1, {"runtime": {"device": "auto"}}, {}, []),
        (2, {"runtime": {"device": "cpu"}}, {}, []),
        (2, {"runtime": {"device": "auto"}}, {"WORLD_SIZE": "2"}, []),
    ],
)
def test_a_process_keeps_its_gpu_and_a_launchers_processes_have_theirs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    config: dict[str, Any],
    variables: dict[str, str],
    taken: list[int],
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(machine, "_held", [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, other = machine.lease(count, tmp_path / f".gpus-{machine.platform.node()}")
    for _ in range(2):  # its later runs
        machine.take_gpu(config, tmp_path)
    other.release()
    assert chosen == taken
