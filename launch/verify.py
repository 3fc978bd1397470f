"""``ditscale verify``: every byte of the shards against the manifest; ``repair=true`` mends what is damaged."""

from pathlib import Path
from typing import Any

from data.manifest import Manifest
from data.progress import ProgressBar
from data.verify import verify
from launch.app import run
from launch.data_settings import settle_by_shards
from launch.encode import encode_shards
from launch.workers import workers_from_environment


def verify_job(config: dict[str, Any], progress: ProgressBar) -> None:
    """Name each damaged file of ``data.shards``. Raises ValueError where there is one and no repair."""
    folder = Path(config["data"]["shards"])
    threads = workers_from_environment(config["threads"]).threads
    manifest, damages = verify(folder, progress, threads)
    for damage in damages:
        print(f"{damage.file} {damage.reason}")
    if damages and config["repair"]:
        encode_shards(config, progress)
        repaired, damages = verify(folder, progress, threads)
        _require_same_data(manifest, repaired)
    if damages:
        raise ValueError(
            f"{len(damages)} of {len(manifest.shards) + 2} files in {folder} are damaged: "
            f"{', '.join(damage.file for damage in damages)}; run `ditscale verify` with the settings of the encoding "
            "and repair=true."
        )
    print(f"{folder}: {len(manifest.shards)} shards with {manifest.num_samples} samples are as the manifest says.")


def _require_same_data(before: Manifest, after: Manifest) -> None:
    """A repair gives the same bytes; on another machine the autoencoder may round otherwise."""
    changed = [new.name for old, new in zip(before.shards, after.shards, strict=True) if old != new]
    if changed:
        print(
            f"note: {', '.join(changed)} came out with other bytes than before, as on another kind of device; runs "
            "that trained on the old ones will refuse them."
        )


def main() -> None:
    """Entry point."""
    run("verify", verify_job, settle_by_shards)


if __name__ == "__main__":
    main()
