"""``ditscale evaluate``: a checkpoint to a line of its run's ``evaluations.jsonl``."""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from data.atomic import sha256_of
from data.manifest import Manifest
from data.progress import ProgressBar
from data.shards import MappedShards
from evaluation.chunks import ChunkStore
from evaluation.evaluate import Evaluator
from evaluation.likelihood import measure_likelihood
from launch.app import run
from launch.build import LoadedCheckpoint, build, build_evaluator, build_shards, model_facts
from launch.check import closest
from model.dit import DiT
from runtime.protocol import Runtime
from train.runfolder import RunFolder

LIKELIHOOD = "nll"  # needs no generated images, so it is no `Metric`


def evaluate_job(config: dict[str, Any], progress: ProgressBar) -> None:
    """Generate, measure, append. Prints the record."""
    known = [*config["evaluation"]["metric"], LIKELIHOOD]
    for name in config["metrics"]:
        if name not in known:
            raise ValueError(f"There is no metric {name!r}{closest(name, known)} There are: {', '.join(known)}.")
    runtime: Runtime = build(config["runtime"], precision=config["precision"])
    checkpoint = LoadedCheckpoint.load(config["checkpoint"], config["weights"], runtime)
    folder = RunFolder(checkpoint.run_dir)
    folder.read_config()  # refuses a folder that is no run's
    data = config["data"]
    if (data["name"], data["image_size"]) != (checkpoint.spec.source, checkpoint.spec.image_size):
        raise ValueError(
            f"The checkpoint was trained on {checkpoint.spec.source} at {checkpoint.spec.image_size} px, but the "
            f"reference would be {data['name']} at {data['image_size']} px; choose data={checkpoint.spec.source}."
        )
    if config["compile"]:
        compile_blocks(checkpoint.model, runtime.device)
    generator = checkpoint.generator(config, config["evaluation"]["seed"], runtime)
    metrics: dict[str, Any] = {}
    store = ChunkStore()
    if names := [name for name in config["metrics"] if name != LIKELIHOOD]:
        evaluator = build_evaluator(config, runtime, progress, names)
        store = _store(evaluator, checkpoint, config["weights"])
        metrics |= evaluator.evaluate(generator, progress, store, build(config["evaluation"]["image_file"]))
    if LIKELIHOOD in config["metrics"]:
        shards = _shards_of(checkpoint, data)
        settings = config["evaluation"]
        metrics |= measure_likelihood(generator, shards, settings["num_images"], settings["batch_size"], progress)
    record = {
        "step": checkpoint.step,
        "images_seen": checkpoint.images_seen,
        "evaluated_by": "evaluate",
        **model_facts(checkpoint.model, checkpoint.images_seen, config["weights"], checkpoint.training_seed),
        **metrics,
    }
    if runtime.is_main:
        folder.append(folder.evaluations, record)
        print(json.dumps(record, indent=1))
    runtime.wait()  # until the record is written
    store.clear()


def compile_blocks(model: DiT, device: torch.device) -> None:
    """Compile block by block: all of them share one compilation.

    Raises ValueError under XLA, and on a CPU without the C++ compiler that PyTorch would call.
    """
    if device.type == "xla":
        raise ValueError("compile=true is for runtime=accelerate; XLA compiles by itself, so leave it out.")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"compile=true needs a C++ compiler, but there is no {compiler}; install one, name yours by the variable "
            "CXX, or leave compile out."
        )
    for block in model.block_list:
        block.compile()


def _store(evaluator: Evaluator, checkpoint: LoadedCheckpoint, weights: str) -> ChunkStore:
    """Finished chunks of this evaluation: of these weights, in this way, seen by this extractor."""
    identity = {
        "checkpoint": sha256_of(checkpoint.path / "state.json"),  # which holds the hashes of the weights
        "weights": weights,
        "batch_size": evaluator.batch_size,
        "protocol": asdict(evaluator.protocol),
        "feature_extractor": evaluator.extractor.hash,
    }
    return ChunkStore(checkpoint.run_dir / "chunks", identity)


def _shards_of(checkpoint: LoadedCheckpoint, data: Mapping[str, Any]) -> MappedShards:
    """The shards, refused where their latents are not those that the checkpoint was trained on."""
    Manifest.load(data["shards"]).require(checkpoint.spec, data["shards"])
    return build_shards(data)


def main() -> None:
    """Entry point."""
    run("evaluate", evaluate_job)


if __name__ == "__main__":
    main()
