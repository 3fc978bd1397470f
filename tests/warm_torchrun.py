"""Run ``ditscale WORDS...`` in ranks that torchrun's agent starts by forking, in a process that has imported all.

The agent is torchrun's, and so are the ranks' parent, variables, signals and exit codes; only its way of starting them
differs. ``tests/smoke/test_sweep.py`` starts torchrun itself. Called with the number of ranks and the words.
"""

import os
import signal
import sys
import uuid
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from warm_python import TRAINING, WarmProcesses, start_warm_python

from launch import cli
from launch.command import app


def start_torchrun(ranks: int, *words: str, cwd: Path, output: Path) -> WarmProcesses:
    """Start ``ditscale WORDS...`` in so many ranks; the process that is returned is their parent."""
    return start_warm_python(TRAINING, __file__, str(ranks), *words, cwd=cwd, output=output)


def ranks_of(job: WarmProcesses) -> list[psutil.Process]:
    """Return the processes of the ranks, in their order."""
    return psutil.Process(job.pids[0]).children()


def rank(*words: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)  # the agent's
    app.STARTED_BY = os.getppid()  # a fresh process reads it when it imports this
    sys.argv = ["ditscale", *words]
    cli.main()


@record
def main() -> None:
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex}  # as --standalone
    sizes = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": int(sys.argv[1]), "max_restarts": 0}
    elastic_launch(LaunchConfig(**sizes, **place, start_method="fork", monitor_interval=0.1), rank)(*sys.argv[2:])


if __name__ == "__main__":
    main()
