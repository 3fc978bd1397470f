"""Verify a folder of shards: read every byte, and recompute from the shards what the other files state.

Only manifest, indices and shards are required. Sidecars, ``classes.json`` and
``skipped.jsonl`` may be missing, for example from a copy of the folder; where they exist, they must be correct.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from core.names import inside
from core.progress import ProgressBar
from core.reading import DamagedFileError, is_absent, open_regular, read_regular, sha256_of
from core.records import check, parse_object
from data.caption_file import CaptionFile, open_captions
from data.caption_tokens import read_empty_caption
from data.channel_sums import ChannelSums, channel_statistics, statistics_agree
from data.embedding_file import require_embeddings
from data.encode import CLASSES_NAME, SKIPPED_NAME, classes_text, skipped_text
from data.manifest import CAPTIONS_NAME, FORMAT, MANIFEST_NAME, Manifest, ShardEntry
from data.shard_index import (
    INDEX_NAME,
    IndexFile,
    empty_caption_file,
    index_file,
    labels_file,
    read_index,
    read_source_ids,
)
from data.shard_tars import Layout, ShardFacts, facts_of
from data.sidecars import Sidecar, SkippedImage, read_sidecar, sidecar_path

Result = TypeVar("Result")


class Damage(NamedTuple):
    """A damaged file and the reason."""

    file: str
    reason: str


class _Indices(NamedTuple):
    """The statements of the files beside the shards on all rows; those of damaged ones are missing."""

    rows: dict[str, list["_Rows"]]  # of each shard, by the name of the index that has them
    first_rows: list[int]  # of each shard, and the number of rows
    captions: CaptionFile | None


class _Rows(NamedTuple):
    """The entries of one shard in an index."""

    labels: list[int]
    layout: Layout
    source_ids: list[str] | None  # None in ``labels.npz``


class _Checked(NamedTuple):
    """The findings on one shard and its sidecar; None where a file is missing or damaged."""

    damages: list[Damage]
    sums: ChannelSums | None
    sidecar: Sidecar | None


def verify(folder: Path, progress: ProgressBar, threads: int = 2) -> tuple[Manifest, list[Damage]]:
    """Return the manifest and every file that is damaged or contradicts the shards.

    The checks cover sizes, hashes, every sample's label, offset, shape, dtype, values and captions, the statistics, and
    all content of index, sidecars, ``classes.json`` and ``skipped.jsonl``. Raises ValueError where the manifest itself
    is missing or damaged.
    """
    manifest = Manifest.load(folder)
    damages: list[Damage] = []
    indices = _indices(damages, folder, manifest)
    checked = []
    with (
        progress("verify", 0, manifest.num_samples, "sample") as bar,
        ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool,
    ):
        results = pool.map(lambda number: _checked(folder, manifest, number, indices), range(len(manifest.shards)))
        for shard, result in zip(manifest.shards, results, strict=True):
            bar.update(shard.count)
            damages += result.damages
            checked.append(result)
    damages += _statistics(manifest, checked)
    damages += _texts(folder, manifest, [result.sidecar for result in checked])
    damages += _empty_caption(folder, manifest)
    return manifest, damages


def files_of(folder: Path, manifest: Manifest) -> list[str]:
    """Return the names of the files that `verify` reads."""
    sidecars = [sidecar_path(folder / shard.name) for shard in manifest.shards]
    optional = [path for path in (*sidecars, folder / CLASSES_NAME, folder / SKIPPED_NAME) if os.path.lexists(path)]
    captions = [] if manifest.captions is None else [CAPTIONS_NAME]
    captions += [file.name for file in [empty_caption_file(manifest)] if file is not None]
    shards = [file.name for file in (*manifest.shards, *manifest.embeddings)]
    required = [MANIFEST_NAME, *_index_files(manifest), *captions, *shards]
    return [*required, *(path.name for path in optional)]


def _index_files(manifest: Manifest) -> dict[str, IndexFile]:
    return {file.name: file for file in (index_file(manifest), labels_file(manifest))}


def _attempt(damages: list[Damage], folder: Path, name: str, action: Callable[[], Result]) -> Result | None:
    """Return the result of ``action``; where the file ``name`` is damaged, append the reason and return None."""
    try:
        return action()
    except PermissionError:
        raise  # not damage: the command line has its own message for missing permissions
    except OSError as error:
        reason = "is missing" if is_absent(error) else f"cannot be read: {error.strerror}"
    except ValueError as error:
        reason = str(error).removeprefix(f"{folder / name} ").removesuffix(".")
    damages.append(Damage(name, reason))
    return None


def _indices(damages: list[Damage], folder: Path, manifest: Manifest) -> _Indices:
    """Return what the indices and the file of captions state, without damaged ones."""
    found = {}
    for name, file in _index_files(manifest).items():
        rows = _attempt(damages, folder, name, partial(_rows, folder, manifest, file))
        if rows is not None:
            found[name] = rows
    captions = None
    if manifest.captions is not None:
        opened = partial(_opened_captions, folder, manifest)
        captions = _attempt(damages, folder, CAPTIONS_NAME, opened)
    return _Indices(found, [0, *accumulate(shard.count for shard in manifest.shards)], captions)


def _opened_captions(folder: Path, manifest: Manifest) -> CaptionFile:
    return open_captions(inside(folder, CAPTIONS_NAME, FORMAT), manifest)


def _rows(folder: Path, manifest: Manifest, file: IndexFile) -> list[_Rows]:
    """Return the entries of each shard in an index. Raises OSError or ValueError where it is damaged."""
    path = inside(folder, file.name, FORMAT)
    if (found := sha256_of(path)) != file.sha256:
        raise DamagedFileError(f"{path} has sha256 {found}, not {file.sha256}.")
    content = read_regular(path, file.max_bytes)
    labels, layouts = read_index(content, manifest, str(path))
    source_ids = read_source_ids(content, manifest, str(path)) if file.name == INDEX_NAME else None
    rows, first = [], 0
    for shard, layout in zip(manifest.shards, layouts, strict=True):
        part = slice(first, first + shard.count)
        rows.append(_Rows(labels[part].tolist(), layout, None if source_ids is None else source_ids[part].tolist()))
        first = part.stop
    return rows


def _checked(folder: Path, manifest: Manifest, number: int, indices: _Indices) -> _Checked:
    damages: list[Damage] = []
    shard = manifest.shards[number]
    facts = _attempt(damages, folder, shard.name, lambda: _facts(folder, manifest, shard))
    for name, rows in indices.rows.items():
        if facts is None:
            break
        if facts.labels != rows[number].labels:
            damages.append(Damage(name, f"has other labels than {shard.name}"))
        if facts.layout != rows[number].layout:
            damages.append(Damage(name, f"has {rows[number].layout} for {shard.name}, which has {facts.layout}"))
    source_ids = indices.rows[INDEX_NAME][number].source_ids if INDEX_NAME in indices.rows else None
    captions = None
    if (file := indices.captions) is not None:
        read = partial(_captions, file, manifest, *indices.first_rows[number : number + 2])
        captions = _attempt(damages, folder, CAPTIONS_NAME, read)
    if manifest.embeddings:
        damages += _embeddings(folder, manifest, number, captions)
    path = sidecar_path(folder / shard.name)
    sidecar = None
    if os.path.lexists(path):
        stated = _Stated(source_ids, captions)
        sidecar = _attempt(damages, folder, path.name, lambda: _sidecar(folder, manifest, shard, stated, facts))
    return _Checked(damages, facts.sums if facts else None, sidecar)


def _captions(file: CaptionFile, manifest: Manifest, start: int, stop: int) -> list[list[str]]:
    """Return the captions of rows, after checking their token ids. Raises DamagedFileError."""
    if manifest.captions is not None and manifest.captions.tokens is not None:
        file.tokens_of_rows(start, stop)
    return file.of_rows(start, stop)


def _embeddings(folder: Path, manifest: Manifest, number: int, captions: list[list[str]] | None) -> list[Damage]:
    """Read the embeddings of a shard's captions, which are None where their file is damaged."""
    entry, damages = manifest.embeddings[number], list[Damage]()
    assert manifest.captions is not None
    assert manifest.captions.tokens is not None
    spec = manifest.captions.tokens.encoder
    _attempt(damages, folder, entry.name, lambda: require_embeddings(inside(folder, entry.name, FORMAT), entry, spec))
    if captions is not None and (count := sum(map(len, captions))) != entry.count:
        damages.append(
            Damage(MANIFEST_NAME, f"has {entry.count} captions in {entry.name}, but {CAPTIONS_NAME} {count}")
        )
    return damages


def _facts(folder: Path, manifest: Manifest, shard: ShardEntry) -> ShardFacts:
    """Read a shard's bytes. Raises OSError or ValueError where they do not match the manifest."""
    path = inside(folder, shard.name, str(folder / MANIFEST_NAME))
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    if size != shard.bytes:
        raise DamagedFileError(f"{path} has {size} bytes, not {shard.bytes}.")
    if (found := sha256_of(path)) != shard.sha256:
        raise DamagedFileError(f"{path} has sha256 {found}, not {shard.sha256}.")
    return facts_of(path, manifest.spec, shard.count, teacher=manifest.teacher)


class _Stated(NamedTuple):
    """The statements of the other files on a shard's rows; None where they are damaged, or there are no captions."""

    source_ids: list[str] | None
    captions: list[list[str]] | None


def _sidecar(folder: Path, manifest: Manifest, shard: ShardEntry, stated: _Stated, facts: ShardFacts | None) -> Sidecar:
    """Read a shard's sidecar. Raises OSError or ValueError where it contradicts the shard, manifest or index."""
    sidecar, _ = read_sidecar(folder, shard.name, manifest.spec)
    path = sidecar_path(folder / shard.name)
    if (sidecar.plan, sidecar.entry) != (manifest.plan_hash, shard):
        raise DamagedFileError(f"{path} records another plan or other bytes of {shard.name} than the manifest.")
    if stated.source_ids is not None and sidecar.source_ids != stated.source_ids:
        raise DamagedFileError(f"{path} has other names of images than {INDEX_NAME}.")
    if stated.captions is not None and (sidecar.captions or []) != stated.captions:
        raise DamagedFileError(f"{path} has other captions than {CAPTIONS_NAME}.")
    if manifest.captions is None and sidecar.captions is not None:
        raise DamagedFileError(f"{path} has captions, but {MANIFEST_NAME} has none.")
    if sidecar.embeddings != (manifest.embeddings[manifest.shards.index(shard)] if manifest.embeddings else None):
        raise DamagedFileError(f"{path} records other embeddings of captions than {MANIFEST_NAME}.")
    if facts is not None:
        if (sidecar.labels, sidecar.layout) != (facts.labels, facts.layout):
            raise DamagedFileError(f"{path} has other labels or another layout than {shard.name}.")
        if facts.sums is None or not facts.sums.agrees(sidecar.sums):
            raise DamagedFileError(f"{path} has other sums than {shard.name}.")
    return sidecar


def _statistics(manifest: Manifest, checked: Sequence[_Checked]) -> list[Damage]:
    """Check the manifest's statistics against the sidecars, and against the shards up to rounding to float16."""
    stated = (manifest.latent_mean, manifest.latent_std)
    recorded = [result.sidecar.sums for result in checked if result.sidecar is not None]
    if len(recorded) == len(checked) and not np.allclose(channel_statistics(recorded), stated, rtol=1e-9, atol=1e-12):
        return [Damage(MANIFEST_NAME, f"has latent_mean and latent_std {stated}, but the sidecars have other sums")]
    sums = [result.sums for result in checked if result.sums is not None]
    if len(sums) < len(checked):
        return []
    for name, found, expected in zip(("mean", "std"), channel_statistics(sums), stated, strict=True):
        if not statistics_agree(found, expected, manifest.latent_std):
            return [Damage(MANIFEST_NAME, f"has latent_{name} {expected}, but the shards have {found}")]
    return []


def _empty_caption(folder: Path, manifest: Manifest) -> list[Damage]:
    file = empty_caption_file(manifest)
    damages: list[Damage] = []
    if file is not None:
        _attempt(damages, folder, file.name, partial(_require_empty_caption, folder, manifest, file))
    return damages


def _require_empty_caption(folder: Path, manifest: Manifest, file: IndexFile) -> None:
    path = inside(folder, file.name, FORMAT)
    content = read_regular(path, file.max_bytes)
    if (found := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise DamagedFileError(f"{path} has sha256 {found}, not {file.sha256}.")
    assert manifest.captions is not None
    assert manifest.captions.tokens is not None
    read_empty_caption(content, manifest.captions.tokens.encoder, str(path))


def _texts(folder: Path, manifest: Manifest, sidecars: Sequence[Sidecar | None]) -> list[Damage]:
    """Return the damage of the files that only people read."""
    damages: list[Damage] = []
    known = [sidecar for sidecar in sidecars if sidecar is not None]
    skipped = [skip for sidecar in known for skip in sidecar.skipped] if len(known) == len(sidecars) else None
    if skipped is not None and len(skipped) != manifest.num_skipped:
        damages.append(Damage(MANIFEST_NAME, f"has num_skipped {manifest.num_skipped}, the sidecars {len(skipped)}"))
    if os.path.lexists(folder / CLASSES_NAME):
        _attempt(damages, folder, CLASSES_NAME, lambda: _require_classes(folder, manifest))
    if os.path.lexists(folder / SKIPPED_NAME):
        _attempt(damages, folder, SKIPPED_NAME, lambda: _require_skipped(folder, manifest, skipped))
    return damages


def _require_classes(folder: Path, manifest: Manifest) -> None:
    path = inside(folder, CLASSES_NAME, FORMAT)
    if read_regular(path) != classes_text(manifest.class_names):
        raise DamagedFileError(f"{path} has other classes than {MANIFEST_NAME}.")


def _require_skipped(folder: Path, manifest: Manifest, skipped: list[SkippedImage] | None) -> None:
    path = inside(folder, SKIPPED_NAME, FORMAT)
    content = read_regular(path)
    lines = [parse_object(line, str(path)) for line in content.splitlines()]
    for line in lines:
        check(SkippedImage, line, str(path))
    if len(lines) < manifest.num_skipped:
        raise DamagedFileError(f"{path} has {len(lines)} lines, but the manifest counts {manifest.num_skipped} images.")
    # The first lines are files of the source that give no rows; the shards do not know about those.
    if skipped is not None and not content.endswith(skipped_text(skipped)):
        raise DamagedFileError(f"{path} names other images or reasons than the sidecars.")
