"""``ditscale encode``: images to webdataset shards of latents."""

from pathlib import Path
from typing import Any

from data.encode import encode
from data.progress import ProgressBar
from launch.app import run
from launch.build import build


def encode_job(config: dict[str, Any], progress: ProgressBar) -> None:
    """Make the shards that ``data`` describes."""
    data = config["data"]
    folder = Path(data["shards"])
    manifest = encode(
        build(data["source"]),
        build(data["autoencoder"]),
        folder,
        image_size=data["image_size"],
        flip=data["flip"],
        samples_per_shard=data["samples_per_shard"],
        batch_size=config["batch_size"],
        seed=config["seed"],
        progress=progress,
    )
    size = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{manifest.num_samples} samples of {manifest.spec.num_classes} classes in {len(manifest.shards)} "
        f"shards, {size / 2**20:.1f} MiB: {folder / 'manifest.json'}"
    )


def main() -> None:
    """Entry point."""
    run("encode", encode_job)


if __name__ == "__main__":
    main()
