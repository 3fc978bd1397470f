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
    evaluator = build_evaluator(config)
    generator = checkpoint.generator(config, evaluator.protocol.sampling_seed, runtime)
    metrics = evaluator.evaluate(generator, progress)
    record = {
        "step": checkpoint.step,
        "images_seen": checkpoint.images_seen,
        **model_facts(checkpoint.model, checkpoint.images_seen, config["weights"], checkpoint.training_seed),
        **metrics,
    }
    if runtime.is_main:
        folder.append(folder.evaluations, record)
        print(json.dumps(record, indent=1))


def main() -> None:
    """Entry point."""
    run("evaluate", evaluate_job)


if __name__ == "__main__":
    main()
