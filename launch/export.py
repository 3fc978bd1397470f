"""``ditscale export``: a checkpoint's weights to another program."""

from pathlib import Path
from typing import Any

import torch

from data.atomic import atomic_file, atomic_folder
from data.progress import ProgressBar
from launch.app import run
from launch.build import load_model
from model.convert import to_diffusers, to_reference


def export_job(config: dict[str, Any], progress: ProgressBar) -> None:
    """Write ``out``: a ``.pt`` with the released code's names, or a folder that diffusers loads."""
    model = load_model(config["checkpoint"], config["weights"])
    out = Path(config["out"])
    if out.exists():
        raise ValueError(f"{out} exists already; give another out, or remove it.")
    if config["to"] == "reference":
        with atomic_file(out) as file:
            torch.save(to_reference(model), file)
    else:
        with atomic_folder(out) as aside:
            to_diffusers(model, aside)
    print(f"{config['weights']} weights of {config['checkpoint']} for {config['to']}: {out}")
    if config["to"] == "diffusers" and model.config.frequency_shift == 0:
        print("note: diffusers' DiT spaces the timestep's frequencies otherwise, so its outputs are a little off.")


def main() -> None:
    """Entry point."""
    run("export", export_job)


if __name__ == "__main__":
    main()
