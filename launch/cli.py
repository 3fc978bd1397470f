"""``ditscale JOB ...overrides``: finds the job and hands it the rest of the command line."""

import importlib
import sys

from data.urls import redacted
from launch.check import closest

JOBS = {
    "encode": "images to webdataset shards of latents",
    "verify": "re-reads shards against their manifest; repair=true mends them",
    "train": "shards to a run folder; -m sweeps over models; the same command continues; replay=DUMP explains a NaN",
    "sample": "a checkpoint to a PNG grid and an .npz",
    "evaluate": "a checkpoint to numbers",
    "reference": "real images to the statistics that generated ones are compared with",
    "export": "a checkpoint's weights to the released code's names or to diffusers",
    "plan": "what a model or a sweep costs: Gflops, parameters, memory, hours, disk",
    "report": "the runs of a sweep to the curve of distance against Gflops",
}


def _help() -> str:
    lines = ["usage: ditscale JOB [NAME=VALUE ...]", ""]
    lines += [f"  {job:10s} {line}" for job, line in JOBS.items()]
    return "\n".join([*lines, "", "ditscale JOB --help shows a job's settings."])


def main() -> None:
    """Entry point of the command ``ditscale``."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        sys.exit(0 if arguments else 2)
    job = arguments[0]
    if job not in JOBS:
        print(redacted(f"ditscale: error: There is no job {job!r}{closest(job, JOBS)}"), file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"ditscale {job}", *arguments[1:]]
    importlib.import_module(f"launch.{job}").main()


if __name__ == "__main__":
    main()
