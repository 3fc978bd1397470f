"""Re-reads every byte of a folder of shards against its manifest."""

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.manifest import LatentSpec, Manifest, ShardEntry
from data.progress import ProgressBar
from data.reading import sha256_of
from data.shards import INDEX_NAME
from data.sidecars import channel_statistics, channel_sums


class Damage(NamedTuple):
    """A file that is not what the manifest says."""

    file: str
    reason: str


def verify(folder: Path, progress: ProgressBar, threads: int = 2) -> tuple[Manifest, list[Damage]]:
    """Every damaged file: counts, sizes, checksums, labels, shapes, finite values, and the statistics of all.

    Raises ValueError where the manifest itself is missing or damaged.
    """
    manifest = Manifest.load(folder)
    damages, labels = _index(folder, manifest)
    sums = []
    with (
        progress("verify", 0, manifest.num_samples, "sample") as bar,
        ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool,
    ):
        for shard, result in zip(
            manifest.shards,
            pool.map(lambda job: _checked(folder, manifest.spec, *job), _jobs(manifest, labels)),
            strict=True,
        ):
            bar.update(shard.count)
            if isinstance(result, Damage):
                damages.append(result)
            else:
                sums.append(result)
    if not damages:
        damages += _statistics(manifest, sums)
    return manifest, damages


def _index(folder: Path, manifest: Manifest) -> tuple[list[Damage], NDArray[np.int32] | None]:
    path = folder / INDEX_NAME
    if not path.is_file():
        return [Damage(INDEX_NAME, "is missing")], None
    if (found := sha256_of(path)) != manifest.index_sha256:
        return [Damage(INDEX_NAME, f"has sha256 {found}, not {manifest.index_sha256}")], None
    with np.load(path, allow_pickle=False) as index:
        labels: NDArray[np.int32] = index["label"]
    if len(labels) != manifest.num_samples:
        return [Damage(INDEX_NAME, f"has {len(labels)} labels, not {manifest.num_samples}")], None
    return [], labels


def _jobs(
    manifest: Manifest, labels: NDArray[np.int32] | None
) -> Iterator[tuple[ShardEntry, NDArray[np.int32] | None]]:
    first = 0
    for shard in manifest.shards:
        yield shard, None if labels is None else labels[first : first + shard.count]
        first += shard.count


def _checked(
    folder: Path, spec: LatentSpec, shard: ShardEntry, labels: NDArray[np.int32] | None
) -> Damage | dict[str, Any]:
    """What is wrong with a shard, or the sums of its values."""
    path = folder / shard.name
    if not path.is_file():
        return Damage(shard.name, "is missing")
    if (size := path.stat().st_size) != shard.bytes:
        return Damage(shard.name, f"has {size} bytes, not {shard.bytes}")
    if (found := sha256_of(path)) != shard.sha256:
        return Damage(shard.name, f"has sha256 {found}, not {shard.sha256}")
    try:
        moments, found_labels = _read(path)
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        return Damage(shard.name, f"cannot be read: {error}")
    if len(moments) != shard.count:
        return Damage(shard.name, f"has {len(moments)} samples, not {shard.count}")
    for sample in moments:
        if sample.shape != spec.sample_shape or sample.dtype != spec.dtype:
            return Damage(shard.name, f"has a sample {sample.dtype}{sample.shape}, not {spec.dtype}{spec.sample_shape}")
    if labels is not None and found_labels != labels.tolist():
        return Damage(shard.name, f"has other labels than {INDEX_NAME}")
    values = np.stack(moments).astype(np.float32) if moments else np.empty((0, *spec.sample_shape), np.float32)
    if not np.isfinite(values).all():
        return Damage(shard.name, f"has {int((~np.isfinite(values)).sum())} values that are not finite")
    return channel_sums(values, spec.channels)


def _read(path: Path) -> tuple[list[NDArray[Any]], list[int]]:
    """Samples and labels by the tar's own headers, not by the index."""
    moments, labels = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            content = file.read()
            if member.name.endswith(".npy"):
                moments.append(np.load(io.BytesIO(content), allow_pickle=False))
            elif member.name.endswith(".cls"):
                labels.append(int(content))
    return moments, labels


def _statistics(manifest: Manifest, sums: list[dict[str, Any]]) -> list[Damage]:
    """The manifest's were made before rounding to float16, so they agree to about 1e-3 only."""
    for name, found, expected in zip(
        ("mean", "std"), channel_statistics(sums), (manifest.latent_mean, manifest.latent_std), strict=True
    ):
        if not np.allclose(found, expected, rtol=2e-3, atol=2e-3 * max(manifest.latent_std)):
            return [Damage("manifest.json", f"has latent_{name} {expected}, but the shards have {found}")]
    return []
