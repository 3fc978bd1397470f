"""Run one process of a task: ``python -m launch.slurm.task FOLDER INDEX``, started by srun.

Its exit code goes to a file, since SLURM keeps only one of a task's and mixes in those of the steps that it kills.
"""

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

from core.atomic import write_bytes
from launch.slurm.plan import Plan, ended_file, read_plan
from train.signals import EX_TEMPFAIL, STOPS

_OTHERS_SEC = 5.0  # in which processes that fail for the same reason write their codes


def main() -> NoReturn:
    """Run the planned command in this process, write its exit code, and exit with it."""
    folder, index = Path(sys.argv[1]), int(sys.argv[2])
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    ended = ended_file(folder, index, rank)

    def stop(number: int, frame: FrameType | None) -> None:  # before the job handles signals there is nothing to save
        write_bytes(ended, f"{EX_TEMPFAIL}\n".encode())
        os._exit(EX_TEMPFAIL)

    for number in STOPS:
        signal.signal(number, stop)
    code = 0
    try:
        _run(read_plan(folder), index)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except (OSError, ValueError) as error:
        print(f"ditscale: error: {error}", file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # the code is known
    write_bytes(ended, f"{code}\n".encode())
    if code not in (0, EX_TEMPFAIL) and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        time.sleep(_OTHERS_SEC)  # srun ends the others as soon as this one ends, before they can write their codes
    sys.exit(code)


def _run(plan: Plan, index: int) -> None:
    run = plan.runs[0 if plan.shares else index]
    os.environ.update(launched(plan, index))
    os.environ.pop("HYDRA_FULL_ERROR", None)  # set by the process that submitted, for itself
    os.chdir(plan.directory)
    sys.argv = ["ditscale", plan.job, *run.words]
    from launch.cli import main as ditscale  # imported here, where its time counts as the run's

    ditscale()


def launched(plan: Plan, index: int) -> dict[str, str]:
    """Return the variables that torchrun would set, by SLURM's, or none for a process alone.

    The tasks of an encoding are its ranks. Rank 0, which waits for the others, is the last to start.
    """
    if plan.shares:
        numbers = {"RANK": plan.shares - 1 - index, "WORLD_SIZE": plan.shares, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return {"MASTER_ADDR": "localhost", **{name: str(number) for name, number in numbers.items()}}
    world = int(os.environ.get("SLURM_NTASKS", "1"))
    if world == 1:
        os.environ.pop("MASTER_PORT", None)
        return {}
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world // nodes),
        "MASTER_ADDR": os.environ["SLURM_LAUNCH_NODE_IPADDR"],  # of the first host, on which the batch script runs
    }


if __name__ == "__main__":
    main()
