"""``ditscale evaluate``: a checkpoint to a line of its run's ``evaluations.jsonl``."""

import json
from typing import Any

from data.progress import ProgressBar
from launch.app import run
from launch.build import LoadedCheckpoint, build, build_evaluator, model_facts
from runtime.protocol import Runtime
from train.runfolder import RunFolder


def evaluate_job(config: dict[str, Any], progress: ProgressBar) -> None:
    """Generate, measure, append. Prints the record."""
    runtime: Runtime = build(config["runtime"])
    checkpoint = LoadedCheckpoint.load(config["checkpoint"], config["weights"], runtime)
    data = config["data"]
    if (data["name"], data["image_size"]) != (checkpoint.spec.source, checkpoint.spec.image_size):
        raise ValueError(
            f"The checkpoint was trained on {checkpoint.spec.source} at {checkpoint.spec.image_size} px, but the "
            f"reference would be {data['name']} at {data['image_size']} px; choose data={checkpoint.spec.source}."
        )
    evaluator = build_evaluator(config)
    generator = checkpoint.generator(config, evaluator.protocol.seed, runtime)
    metrics = evaluator.evaluate(generator, progress)
    record = {
        "step": checkpoint.step,
        "images_seen": checkpoint.images_seen,
        **model_facts(checkpoint.model, checkpoint.images_seen, config["weights"]),
        **metrics,
    }
    if runtime.is_main:
        folder = RunFolder(checkpoint.run_dir)
        folder.append(folder.evaluations, record)
        print(json.dumps(record, indent=1))


def main() -> None:
    """Entry point."""
    run("evaluate", evaluate_job)


if __name__ == "__main__":
    main()
