"""The encode job: images to a folder of shards. Running it again finishes or repairs what is there."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.atomic import sha256_of, write_bytes
from data.images import to_unit_range
from data.manifest import FORMAT_VERSION, MANIFEST_NAME, LatentSpec, Manifest, ShardEntry
from data.progress import ProgressBar
from data.shards import INDEX_NAME, Layout, write_index, write_shard
from data.sources import Source, checked_example
from diffusion.draws import Philox, Purpose, permutation
from model.autoencoder import Autoencoder


def latent_spec(name: str, num_classes: int, autoencoder: Autoencoder, image_size: int, flip: bool) -> LatentSpec:
    """The spec of latents that this autoencoder gives of the data set ``name``.

    Raises ValueError where the image size is no multiple of the autoencoder's factor.
    """
    if image_size % autoencoder.downscale:
        raise ValueError(
            f"data.image_size {image_size} is no multiple of {autoencoder.downscale}, the factor of the "
            f"autoencoder {autoencoder.name}; use {image_size - image_size % autoencoder.downscale}."
        )
    return LatentSpec(
        source=name,
        image_size=image_size,
        autoencoder=autoencoder.name,
        autoencoder_revision=autoencoder.revision,
        scale=autoencoder.scale,
        downscale=autoencoder.downscale,
        channels=autoencoder.channels,
        dtype="float16",
        flip=flip,
        num_classes=num_classes,
    )


@dataclass(frozen=True)
class Plan:
    """What goes into which shard, before anything is encoded."""

    spec: LatentSpec
    order: NDArray[np.int64]  # source index of each row: classes mixed by a fixed permutation
    samples_per_shard: int
    seed: int
    source_fingerprint: str

    @property
    def hash(self) -> str:
        """Identity of the plan; a shard made by another plan is never reused."""
        content = {"version": FORMAT_VERSION, "spec": asdict(self.spec), "seed": self.seed}
        content |= {"source": self.source_fingerprint, "samples_per_shard": self.samples_per_shard}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def shard_firsts(self) -> range:
        """The first row of each shard."""
        return range(0, len(self.order), self.samples_per_shard)


def encode(
    source: Source,
    autoencoder: Autoencoder,
    folder: Path,
    *,
    image_size: int,
    flip: bool,
    samples_per_shard: int,
    batch_size: int,
    seed: int,
    progress: ProgressBar,
) -> Manifest:
    """Encode a source into ``folder``, keep sound shards of an earlier run, and return the manifest.

    Raises ValueError where the folder holds shards of another plan, or an image does not fit.
    """
    spec = latent_spec(source.name, len(source.class_names), autoencoder, image_size, flip)
    order = permutation(Philox(seed), 0, Purpose.ENCODING_ORDER, len(source))
    plan = Plan(spec, order, samples_per_shard, seed, source.fingerprint)
    _require_same_plan(folder, plan)
    with progress("encode", 0, len(order), "img") as bar:
        sidecars = []
        for number, first in enumerate(plan.shard_firsts):
            rows = plan.order[first : first + samples_per_shard]
            path = folder / shard_name(number)
            sidecar = _sound_sidecar(path, plan)
            if sidecar is None:
                sidecar = _encode_shard(path, plan, first, rows, source, autoencoder, batch_size)
            bar.update(len(rows))
            sidecars.append(sidecar)
    return _finish(folder, plan, source.class_names, sidecars)


def _require_same_plan(folder: Path, plan: Plan) -> None:
    if not (folder / MANIFEST_NAME).exists():
        return
    present = Manifest.load(folder)
    if present.plan_hash != plan.hash:
        differences = present.spec.differences(plan.spec) or ["the images, the seed or the shard size differ"]
        raise ValueError(
            f"{folder} already holds other shards: {'; '.join(differences)}; encode into another data.shards."
        )


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def _sidecar_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _sound_sidecar(path: Path, plan: Plan) -> dict[str, Any] | None:
    """The record of a finished shard of this plan, or None where it must be (re)written."""
    try:
        sidecar: dict[str, Any] = json.loads(_sidecar_path(path).read_text(encoding="utf-8"))
        sound = sidecar["plan"] == plan.hash and sidecar["entry"]["sha256"] == sha256_of(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sidecar if sound else None


def _encode_shard(
    path: Path,
    plan: Plan,
    first: int,
    rows: NDArray[np.int64],
    source: Source,
    autoencoder: Autoencoder,
    batch_size: int,
) -> dict[str, Any]:
    """Encode one shard and write it, then its sidecar, whose presence says that the shard is complete."""
    examples = [checked_example(source, int(index), plan.spec.image_size) for index in rows]
    moments = np.concatenate(
        [
            _moments(autoencoder, np.stack([example.image for example in chunk]), plan.spec.flip)
            for chunk in _chunks(examples, batch_size)
        ]
    )
    labels = [example.label for example in examples]
    entry, layout = write_shard(path, first, moments.astype(np.float16), labels)
    sidecar = {
        "plan": plan.hash,
        "entry": asdict(entry),
        "layout": list(layout),
        "labels": labels,
        "source_ids": [example.source_id for example in examples],
        "sums": _channel_sums(moments, plan.spec.channels),
    }
    write_bytes(_sidecar_path(path), json.dumps(sidecar).encode())
    return sidecar


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def _moments(autoencoder: Autoencoder, images: NDArray[np.uint8], flip: bool) -> NDArray[np.float32]:
    """[B, H, W, C] uint8 -> [B, orientations, 2c, h, w]; each orientation is encoded on its own."""
    pixels = to_unit_range(images)
    orientations = [pixels, pixels.flip(3)] if flip else [pixels]
    return torch.stack([autoencoder.moments(view) for view in orientations], dim=1).numpy()


def _channel_sums(moments: NDArray[np.float32], channels: int) -> dict[str, Any]:
    """Exact float64 sums per channel, from which `_statistics` makes mean and standard deviation."""
    mean = moments[:, :, :channels].astype(np.float64)
    variance = np.exp(moments[:, :, channels:].astype(np.float64))
    axes = (0, 1, 3, 4)
    return {
        "count": mean.size // channels,
        "mean": mean.sum(axes).tolist(),
        "square": (mean**2 + variance).sum(axes).tolist(),
    }


def _statistics(sums: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of latents drawn from the posterior.

    E[z] = E[mean] and Var[z] = E[mean^2 + variance] - E[z]^2.
    """
    count = sum(part["count"] for part in sums)
    mean = np.sum([part["mean"] for part in sums], axis=0) / count
    square = np.sum([part["square"] for part in sums], axis=0) / count
    return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0.0)).tolist()


def _finish(folder: Path, plan: Plan, class_names: list[str], sidecars: Sequence[dict[str, Any]]) -> Manifest:
    """Merge the sidecars into the index, then the manifest; shards of an earlier, unfinished plan go."""
    for path in folder.glob("shard-*.tar"):
        if path.name not in {shard_name(number) for number in range(len(sidecars))}:
            path.unlink()
            _sidecar_path(path).unlink(missing_ok=True)
    index = {
        "label": np.array([label for s in sidecars for label in s["labels"]], dtype=np.int32),
        "source_id": np.array([name for s in sidecars for name in s["source_ids"]]),
        "layout": np.array([Layout(*s["layout"]) for s in sidecars], dtype=np.int64),
    }
    write_index(folder / INDEX_NAME, index)
    mean, std = _statistics([s["sums"] for s in sidecars])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        plan_hash=plan.hash,
        spec=plan.spec,
        class_names=class_names,
        shards=[ShardEntry(**s["entry"]) for s in sidecars],
        index_sha256=sha256_of(folder / INDEX_NAME),
        latent_mean=mean,
        latent_std=std,
    )
    manifest.save(folder)
    return manifest
