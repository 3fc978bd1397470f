"""Store what `encode` stores of captions, once the shards of images are finished.

Each process embeds the captions of the shards that it owns, where embeddings are asked for, and records each file in
its shard's sidecar. The first process then writes the captions of all rows.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from core.progress import Progress, ProgressBar
from data.caption_file import require_all_or_none, write_captions
from data.embedding_file import NamedCaption, is_whole, write_embeddings
from data.manifest import CAPTIONS_NAME, EMPTY_CAPTION_NAME, CaptionsSpec, embeddings_name
from data.plan import Plan, shard_name
from data.sidecars import Sidecar, finished, still_finished
from data.text_encoders import TextEncoder

POLL_SEC = 1.0


def store_embeddings(
    folder: Path,
    plan: Plan,
    owned: Sequence[int],
    others: Sequence[int],
    encoder: TextEncoder,
    device: torch.device,
    progress: ProgressBar,
) -> list[Sidecar]:
    """Embed the captions of the shards ``owned`` on ``device``, where undamaged files of an earlier run are missing.

    Returns the sidecars of the shards ``owned`` and of ``others``, in their order, after waiting for the processes that
    embed those. The shards are finished. Raises ValueError as `write_embeddings` does.
    """
    sidecars = {shard: still_finished(folder, shard, plan) for shard in (*owned, *others)}
    found = {shard: sidecar for shard, sidecar in sidecars.items() if _is_embedded(folder, sidecar)}
    total, done = (sum(map(_num_captions, some.values())) for some in (sidecars, found))
    with progress("embed", done, total, "caption") as bar:
        missing = [shard for shard in owned if shard not in found]
        if missing:
            encoder.to(device)
        for shard in missing:
            found[shard] = _embedded(folder, sidecars[shard], encoder, device, bar)
        _wait(folder, plan, others, found, bar)
    return [found[shard] for shard in sorted(found)]


def _embedded(folder: Path, sidecar: Sidecar, encoder: TextEncoder, device: torch.device, bar: Progress) -> Sidecar:
    """Write the embeddings of a shard, then their record; return the sidecar with it."""
    captions = [
        NamedCaption(caption, source_id)
        for source_id, row in zip(sidecar.source_ids, sidecar.captions or [], strict=False)  # none without rows
        for caption in row
    ]
    path = folder / embeddings_name(sidecar.entry.name)
    with_record = replace(sidecar, embeddings=write_embeddings(path, captions, encoder, device, bar.update))
    with_record.save(folder)
    return with_record


def _wait(folder: Path, plan: Plan, shards: Sequence[int], found: dict[int, Sidecar], bar: Progress) -> None:
    """Add the sidecars of shards to ``found`` as other processes embed their captions."""
    while missing := [shard for shard in shards if shard not in found]:
        for shard in missing:
            sidecar = finished(folder, shard, plan)
            if sidecar is not None and _is_embedded(folder, sidecar):
                found[shard] = sidecar
                bar.update(_num_captions(sidecar))
        if any(shard not in found for shard in missing):
            time.sleep(POLL_SEC)


def _is_embedded(folder: Path, sidecar: Sidecar) -> bool:
    entry = sidecar.embeddings
    return entry is not None and is_whole(folder / entry.name, entry)


def _num_captions(sidecar: Sidecar) -> int:
    return sum(map(len, sidecar.captions or []))


def write_texts(
    folder: Path, sidecars: Sequence[Sidecar], plan: Plan, encoder: TextEncoder | None
) -> CaptionsSpec | None:
    """Write the captions of all rows; delete the files of an earlier, unfinished plan that this one does not have."""
    filled = [sidecar for sidecar in sidecars if sidecar.labels]  # others have no rows
    require_all_or_none([(sidecar.source_ids[0], sidecar.captions is not None) for sidecar in filled])
    captions = [sidecar.captions for sidecar in filled if sidecar.captions is not None]
    if not captions or encoder is None:
        remove_file(folder / EMPTY_CAPTION_NAME)
    if not captions:
        remove_file(folder / CAPTIONS_NAME)
        return None
    spec = write_captions(folder, captions, encoder)
    if spec.tokens is None or not plan.embeddings:
        return spec
    embeddings = [sidecar.embeddings for sidecar in sidecars if sidecar.embeddings is not None]
    assert [entry.name for entry in embeddings] == [embeddings_name(shard_name(i)) for i in range(plan.num_shards)]
    return replace(spec, tokens=replace(spec.tokens, embeddings=embeddings))


def remove_file(path: Path) -> None:
    """Delete a file, pipe or link; keep a folder, which this program did not make."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
