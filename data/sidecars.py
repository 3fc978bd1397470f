"""The record of one finished shard, beside it: its presence says that the shard is complete."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.atomic import write_bytes
from data.manifest import ShardEntry
from data.plan import Plan, shard_name
from data.reading import sha256_of
from data.shards import Layout


@dataclass(frozen=True)
class Sidecar:
    """What the manifest and the index need to know of a shard."""

    plan: str  # hash of the plan
    entry: ShardEntry
    layout: Layout
    labels: list[int]
    source_ids: list[str]
    skipped: list[dict[str, Any]]  # source_id and reason of images that could not be read
    sums: dict[str, Any]  # of `channel_sums`

    def save(self, folder: Path) -> None:
        """Write it, after its shard."""
        write_bytes(sidecar_path(folder / self.entry.name), json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, shard: Path) -> "Sidecar | None":
        """The record of a shard, or None where it is missing or damaged."""
        try:
            content = json.loads(sidecar_path(shard).read_text(encoding="utf-8"))
            entry, layout = ShardEntry(**content.pop("entry")), Layout(*content.pop("layout"))
            return cls(entry=entry, layout=layout, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def sidecar_path(shard: Path) -> Path:
    """Where a shard's record lies."""
    return shard.with_suffix(".json")


def finished(folder: Path, shard: int, plan: Plan) -> Sidecar | None:
    """The record of a shard that this plan finished, its content not looked at; None where there is none."""
    sidecar = Sidecar.load(folder / shard_name(shard))
    return sidecar if sidecar is not None and sidecar.plan == plan.hash else None


def sound(folder: Path, shard: int, plan: Plan) -> Sidecar | None:
    """As `finished`, where the shard's bytes are those recorded, too."""
    sidecar, path = finished(folder, shard, plan), folder / shard_name(shard)
    try:
        return sidecar if sidecar is not None and sidecar.entry.sha256 == sha256_of(path) else None
    except OSError:
        return None


def channel_sums(moments: NDArray[np.float32], channels: int) -> dict[str, Any]:
    """Exact float64 sums per channel over [n, orientations, 2c, h, w], from which `channel_statistics` follow."""
    mean = moments[:, :, :channels].astype(np.float64)
    variance = np.exp(moments[:, :, channels:].astype(np.float64))
    axes = (0, 1, 3, 4)
    return {
        "count": mean.size // channels,
        "mean": mean.sum(axes).tolist(),
        "square": (mean**2 + variance).sum(axes).tolist(),
    }


def channel_statistics(sums: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of latents drawn from the posterior.

    E[z] = E[mean] and Var[z] = E[mean^2 + variance] - E[z]^2.
    """
    count = sum(part["count"] for part in sums)
    mean = np.sum([part["mean"] for part in sums], axis=0) / count
    square = np.sum([part["square"] for part in sums], axis=0) / count
    return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0.0)).tolist()
