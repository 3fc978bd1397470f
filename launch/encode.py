"""``ditscale encode``: encode images into webdataset shards of latents."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from core.progress import ProgressBar
from core.remote import is_remote
from data.captions import Captioned
from data.encode import encode
from data.encodings import Encoding
from data.manifest import CaptionsSpec, Manifest
from data.sources import Source
from launch.builders.build import build_preparation
from launch.builders.components import build
from launch.builders.data_settings import write_record
from launch.builders.text_encoders import build_text_encoder, pinned_names
from launch.command.settings import EncodeSettings
from launch.command.workers import worker_device, workers_from_environment
from launch.jobs import start


def encode_job(config: EncodeSettings, progress: ProgressBar) -> None:
    """Write the shards that ``data`` describes; under torchrun, the processes share the work."""
    manifest = encode_shards(config, progress, HydraConfig.get().overrides.task)
    if manifest is not None:
        size = sum(shard.bytes for shard in manifest.shards)
        skipped = f", {manifest.num_skipped} images skipped" if manifest.num_skipped else ""
        print(
            f"{manifest.num_samples} samples of {manifest.spec.num_classes} classes in {len(manifest.shards)} "
            f"shards, {size / 2**20:.1f} MiB{skipped}: {Path(config.data.shards) / 'manifest.json'}"
        )
        if manifest.captions is not None:
            print(f"{manifest.captions.count} captions{_truncated(manifest.captions)}{_embedded(manifest)}")


def _truncated(captions: CaptionsSpec) -> str:
    """Return how many captions are longer than the text encoder's length; empty where there is no encoder."""
    if (tokens := captions.tokens) is None:
        return ""
    return f", {tokens.num_truncated} of them truncated to the {tokens.encoder.length} tokens of {tokens.encoder.name}"


def _embedded(manifest: Manifest) -> str:
    """Return how many bytes their embeddings have; empty where these are not stored."""
    size = sum(file.bytes for file in manifest.embeddings)
    return f", with embeddings of {size / 2**20:.1f} MiB" if size else ""


def encode_shards(config: EncodeSettings, progress: ProgressBar, words: Iterable[str] | None = None) -> Manifest | None:
    """Encode what is missing or damaged in ``data.shards``. Returns the manifest in the first process, else None.

    ``words`` are those of the command line, or None where the settings come from an earlier encoding.
    """
    data = config.data
    if config.text_encoder is not None:
        config = replace(config, text_encoder=pinned_names(config.text_encoder))
    if is_remote(data.shards):
        raise ValueError(
            f"data.shards is {data.shards}, but shards are written to a local folder; encode into one, then copy it."
        )
    autoencoder = build(data.autoencoder)
    if words is not None:
        require_own_scale(autoencoder, words)
    device = worker_device(config.device)
    encoding: Encoding = build(config.encoding)(
        autoencoder=autoencoder,
        preparation=build_preparation(data),
        flip=data.flip,
        device=device,
        **({} if config.teacher is None else {"teacher": build(config.teacher)}),
    )
    source: Source = build(data.source)
    if config.captions is not None:
        source = Captioned(source, build(config.captions))
    workers = workers_from_environment(config.threads)
    if workers.rank == 0:
        for note in notes_of(source):
            print(f"note: {note}")
    manifest = encode(
        source,
        encoding,
        Path(data.shards),
        name=data.name,
        samples_per_shard=data.samples_per_shard,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=progress,
        max_skipped_fraction=config.max_skipped_fraction,
        workers=workers,
        text=None if config.text_encoder is None else build_text_encoder(config.text_encoder),
        embed_on=device if config.text_embeddings else None,
    )
    if manifest is not None:
        write_record(Path(data.shards), config)
    return manifest


def notes_of(source: Source) -> list[str]:
    """Return what a user should know about a source before it is read."""
    notes = list(source.notes)
    if source.left_out:
        first, number = source.left_out[0], len(source.left_out)
        notes.append(f"{number} files of the source are left out; the first is {first.source_id}: {first.reason}.")
    return notes


def require_own_scale(autoencoder: Any, words: Iterable[str]) -> None:
    """Raise ValueError where an autoencoder's file states another scale or shift than a default the user left as is."""
    given = {word.lstrip("+").split("=", 1)[0] for word in words}
    for name in ("scale", "shift"):
        ours, own = getattr(autoencoder, name), getattr(autoencoder, f"own_{name}", None)
        if own is not None and ours != own and f"data.autoencoder.{name}" not in given:
            file_key = {"scale": "scaling_factor", "shift": "shift_factor"}[name]
            raise ValueError(
                f"The autoencoder {autoencoder.name} says {file_key} {_shown(own)} in its config.json, but "
                f"data.autoencoder.{name} is {_shown(ours)} by default; give data.autoencoder.{name}={_shown(own)}, or "
                f"data.autoencoder.{name}={_shown(ours)} to keep it."
            )


def _shown(value: float | list[float]) -> str:
    """Return a number, or one per channel, as the command line takes it."""
    return f"[{','.join(map(repr, value))}]" if isinstance(value, list) else f"{value:g}"


if __name__ == "__main__":
    start("encode")
