"""The jobs of the command line, each in a module of its name."""

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
