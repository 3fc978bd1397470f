"""The jobs of the command line, each a function ``NAME_job(config, progress)`` in a module of its name."""

import pkgutil
from typing import NamedTuple


class Job(NamedTuple):
    """A job's summary for the help, and the function that settles its composed config, as ``module:function``."""

    summary: str
    settle: str | None = None


JOBS = {
    "encode": Job("images to webdataset shards of latents"),
    "verify": Job(
        "re-reads shards against their manifest; repair=true mends them",
        "launch.builders.data_settings:settle_by_shards",
    ),
    "train": Job(
        "shards to a run folder; -m sweeps over models; the same command continues; replay=DUMP explains a NaN",
        "launch.train:settle_training",
    ),
    "sample": Job("a checkpoint to a PNG grid and an .npz"),
    "evaluate": Job("a checkpoint to numbers", "launch.evaluate:settle_evaluation"),
    "reference": Job(
        "real images to the statistics that generated ones are compared with",
        "launch.builders.data_settings:settle_by_shards",
    ),
    "export": Job("a checkpoint's weights to the released code's names or to diffusers"),
    "plan": Job("what a model or a sweep costs: Gflops, parameters, memory, hours, disk", "launch.plan:settle_by_data"),
    "report": Job(
        "the runs of a sweep to the curve of distance against Gflops",
        "launch.command.logger_settings:settle_reports_logger",
    ),
}


def start(job: str) -> None:
    """Run a job with the words of the command line, for ``ditscale JOB`` and ``python -m launch.JOB``."""
    from launch.command.app import run  # imports Hydra, which the list of jobs does not need

    settle = JOBS[job].settle
    function = pkgutil.resolve_name(f"launch.{job}:{job}_job")
    run(job, function, None if settle is None else pkgutil.resolve_name(settle))
