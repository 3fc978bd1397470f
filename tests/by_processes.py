"""Give one worker of pytest all files that fork their jobs from the same process, which then starts once."""

from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

TOGETHER = {
    "xla": "one_run xla_jobs moves collectives lowering replay_elsewhere xla_sampling xla_refusals xla_draws",
    "ranks": "allocator processes signals killed_evaluations hosts compiled encode_processes locks",
    "jobs": "sweep study secrets resume readers remote_training remote_runs",
}
_GROUPS = {f"test_{name}.py": group for group, names in TOGETHER.items() for name in names.split()}


class ByProcesses(LoadFileScheduling):
    """Schedules whole files, as ``--dist loadfile`` does, and some of them together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return _GROUPS.get(Path(file).name, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByProcesses | None:
    """Return the scheduler for ``--dist loadfile``."""
    return ByProcesses(config, log) if config.getoption("dist") == "loadfile" else None
