"""``ditscale verify``: check every byte of the shards against the manifest; ``repair=true`` encodes damage again."""

from pathlib import Path

from core.progress import ProgressBar
from core.remote import is_remote
from data.manifest import Manifest
from data.verify import files_of, verify
from launch.command.settings import VerifySettings
from launch.command.workers import workers_from_environment
from launch.encode import encode_shards
from launch.jobs import start


def verify_job(config: VerifySettings, progress: ProgressBar) -> None:
    """Print each damaged file of ``data.shards``. Raises ValueError where damage remains."""
    if is_remote(config.data.shards):
        raise ValueError(
            f"data.shards is {config.data.shards}, but only a local folder can be verified; copy the shards into "
            "one, or train on them: training checks each shard against the manifest when it fetches it."
        )
    folder = Path(config.data.shards)
    threads = workers_from_environment(config.threads).threads
    manifest, damages = verify(folder, progress, threads)
    for damage in damages:
        print(f"{damage.file} {damage.reason}")
    if damages and config.repair:
        encode_shards(config, progress)
        repaired, damages = verify(folder, progress, threads)
        _require_same_data(manifest, repaired)
    if damages:
        names = list(dict.fromkeys(damage.file for damage in damages))
        way_out = (
            "a repair did not fix them: move them away and run `ditscale encode` again"
            if config.repair
            else "run `ditscale verify` with the settings of the encoding and repair=true"
        )
        raise ValueError(
            f"{len(names)} of {len(files_of(folder, manifest))} files in {folder} are damaged: {', '.join(names)}; "
            f"{way_out}."
        )
    print(f"{folder}: {len(manifest.shards)} shards with {manifest.num_samples} samples match the manifest.")


def _require_same_data(before: Manifest, after: Manifest) -> None:
    """Print a note where a repair changed bytes: on another machine the autoencoder may round differently."""
    old = {shard.name: shard for shard in before.shards}
    changed = [shard.name for shard in after.shards if old.get(shard.name) != shard]
    if changed:
        print(
            f"note: {', '.join(changed)} have other bytes than before, as another kind of device may give; runs that "
            "trained on the old shards will refuse these."
        )


if __name__ == "__main__":
    start("verify")
