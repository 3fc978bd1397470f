"""The jobs of the command line, each a function ``NAME_job(config, progress)`` in a module of its name."""

import pkgutil
from typing import NamedTuple

from core.garbage import uncollected


class Job(NamedTuple):
    """A job's summary for the help, and the function that settles its composed config, as ``module:function``."""

    summary: str
    settle: str | None = None


JOBS = {
    "encode": Job("encode images into webdataset shards of latents"),
    "verify": Job(
        "check shards against their manifest; repair=true encodes damaged ones again",
        "launch.builders.data_settings:settle_by_shards",
    ),
    "train": Job(
        "train a model on shards; -m sweeps over models; the same command continues a run; replay=DUMP explains a NaN",
        "launch.train:settle_training",
    ),
    "sample": Job("generate a PNG grid and an .npz of images from a checkpoint"),
    "serve": Job("open a local page where images of a checkpoint are sampled; needs the extra `serve`"),
    "evaluate": Job("measure the images that a checkpoint generates", "launch.evaluate:settle_evaluation"),
    "reference": Job(
        "compute the statistics of real images that generated ones are compared with",
        "launch.builders.data_settings:settle_by_shards",
    ),
    "export": Job("write a checkpoint's weights for another program, such as the released code or diffusers"),
    "plan": Job(
        "compute what a model or a sweep costs: Gflops, parameters, memory, hours, disk", "launch.plan:settle_by_data"
    ),
    "status": Job("show how each run of a sweep stands: waiting, running, stopped, failed, done"),
    "report": Job(
        "draw distance against Gflops, and the paper's other figures, from the runs of a sweep",
        "launch.command.logger_settings:settle_reports_logger",
    ),
}


def start(job: str) -> None:
    """Run a job with the words of the command line, for ``ditscale JOB`` and ``python -m launch.JOB``."""
    with uncollected():
        from launch.command.app import run, show_help, wants_help  # imports Hydra, which the list of jobs does not need

        if wants_help():
            return show_help(job)  # without PyTorch, whose import takes seconds
        settle = JOBS[job].settle
        function = pkgutil.resolve_name(f"launch.{job}:{job}_job")
        settling = None if settle is None else pkgutil.resolve_name(settle)
    run(job, function, settling)
