"""Encode images to a folder of shards. A second run completes or repairs the folder.

Each process owns whole shards. A shard is written atomically, and its sidecar after it. The first process waits for
the others and writes index and manifest. The bytes depend on the plan and the batch size only, not on the number of
processes or restarts.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.atomic import require_no_folder, write_bytes
from core.locks import HeldError, acquired
from core.progress import Progress, ProgressBar
from core.reading import sha256_of
from data.caption_file import captions_to_store
from data.channel_sums import channel_statistics, channel_sums
from data.encode_text import POLL_SEC, remove_file, store_embeddings, write_texts
from data.encodings import Encoding
from data.manifest import (
    CAPTIONS_NAME,
    EMPTY_CAPTION_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_SOURCE_ID,
    Manifest,
    embeddings_name,
)
from data.pipeline import Encoded, encoded_batches
from data.plan import Plan, shard_name
from data.shard_index import INDEX_NAME, LABELS_NAME, write_index
from data.shard_tars import write_shard
from data.sidecars import Sidecar, SkippedImage, finished, sidecar_path, sound, still_finished
from data.sources import Prepared, Source
from data.text_encoders import TextEncoder

SKIPPED_NAME = "skipped.jsonl"
CLASSES_NAME = "classes.json"
_FLOAT16_OVERFLOW = 65520.0  # the smallest number that rounds to infinity
_OURS = re.compile(r"shard-\d{6,}(\.tar|-text\.npz)")
_ASIDE = re.compile(r"\.([^.]+)\..*\d+\.tmp")  # as `core.atomic` names a file while it is written


@dataclass(frozen=True)
class Workers:
    """The rank of this process, the world size, and the number of threads that read images."""

    rank: int = 0
    world: int = 1
    threads: int = 2


def encode(
    source: Source,
    encoding: Encoding,
    folder: Path,
    *,
    name: str,
    samples_per_shard: int,
    batch_size: int,
    seed: int,
    progress: ProgressBar,
    max_skipped_fraction: float = 0.01,
    workers: Workers = Workers(),
    text: TextEncoder | None = None,
    embed_on: torch.device | None = None,
) -> Manifest | None:
    """Encode a source into ``folder``, keeping undamaged shards of an earlier run.

    ``text`` tokenizes its captions and, where a device is given by ``embed_on``, embeds them there to be stored.

    Returns the manifest on the first process and None on the others. Raises ValueError where the folder holds shards of
    another plan, another job is writing to it, an image does not fit, or more than ``max_skipped_fraction`` of the
    images cannot be read.
    """
    assert embed_on is None or text is not None, "embeddings are those of a text encoder"
    spec, text_spec = encoding.spec(name, len(source.class_names)), None if text is None else text.spec()
    plan = Plan.of(source, spec, samples_per_shard, seed, encoding.teacher, text_spec, embed_on is not None)
    with _claimed(folder, workers):
        require_same_plan(folder, plan)
        _require_few_skipped(folder, [], plan, max_skipped_fraction)
        owned = range(workers.rank, plan.num_shards, workers.world)
        _require_no_folders(folder, owned, plan)
        _remove_leftovers(folder, owned, workers.rank == 0)
        missing, is_left_to_embed = _missing(folder, plan, owned)
        if text is not None and (workers.rank == 0 or is_left_to_embed):
            text.to(torch.device("cpu"))  # damaged weights are found before the images are encoded
        for shard in missing:
            sidecar_path(folder / shard_name(shard)).unlink(missing_ok=True)
        tally = _Tally(folder, plan, set(owned))
        with progress("encode", tally.done_before(missing), len(plan.order), "img") as bar:
            batches = encoded_batches(source, encoding, plan, missing, batch_size, workers.threads)
            _write_shards(folder, plan, batches, tally, bar, max_skipped_fraction)
            sidecars = _wait_for_all(folder, plan, owned, tally, bar) if workers.rank == 0 else []
        if text is not None and embed_on is not None:
            others = [shard for shard in range(len(sidecars)) if shard not in owned]
            sidecars = store_embeddings(folder, plan, owned, others, text, embed_on, progress)
        return None if workers.rank != 0 else finish(folder, plan, sidecars, max_skipped_fraction, text)


@contextmanager
def _claimed(folder: Path, workers: Workers) -> Iterator[None]:
    """Hold a lock on the folder, one for each process of a job; the lock ends with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"data.shards {folder} is not a folder and cannot be made one; choose another.") from error
    path = folder / f".encode-{workers.rank}.lock"
    try:
        lock = acquired(path, timeout_sec=0)
    except HeldError as error:
        raise ValueError(
            f"Another `ditscale encode` is running in {folder} as process {workers.rank}; wait for it, or stop "
            f"it{error.hint}."
        ) from error
    try:
        yield
    finally:
        lock.release()


def require_same_plan(folder: Path, plan: Plan) -> None:
    """Raise ValueError, naming the differences, where the folder holds finished shards of another plan."""
    if not (folder / MANIFEST_NAME).exists():
        return
    present = Manifest.load(folder)
    if present.plan_hash != plan.hash:
        differences = present.spec.differences(plan.spec)
        if present.teacher != plan.teacher:
            differences.append(f"teacher is {present.teacher or 'none'} and not {plan.teacher or 'none'}")
        text = present.captions and present.captions.tokens and present.captions.tokens.encoder
        if text != plan.text:
            differences.append(f"the text encoder is {text or 'none'} and not {plan.text or 'none'}")
        if (stored := bool(present.embeddings)) != plan.embeddings:
            differences.append(f"text_embeddings is {stored} and not {plan.embeddings}".lower())
        differences = differences or ["the images, the seed or the shard size differ, or captions do"]
        raise ValueError(
            f"{folder} already holds other shards: {'; '.join(differences)}; encode into another data.shards."
        )


def _require_no_folders(folder: Path, shards: Iterable[int], plan: Plan) -> None:
    """Raise ValueError, before anything is encoded, where a folder has the name of a file that will be written."""
    for shard in shards:
        require_no_folder(folder / shard_name(shard))
        require_no_folder(sidecar_path(folder / shard_name(shard)))
        if plan.embeddings:
            require_no_folder(folder / embeddings_name(shard_name(shard)))
    of_captions = (CAPTIONS_NAME, EMPTY_CAPTION_NAME)
    for name in (SKIPPED_NAME, CLASSES_NAME, INDEX_NAME, LABELS_NAME, *of_captions, MANIFEST_NAME):
        require_no_folder(folder / name)


def _remove_leftovers(folder: Path, owned: Iterable[int], is_main: bool) -> None:
    """Delete the temporary files that a killed process left of files that this process alone writes.

    These are the shards that it owns and, on the main process, all other files, such as index and manifest.
    """
    names = [shard_name(shard) for shard in owned]
    stems = {Path(name).stem for shard in names for name in (shard, embeddings_name(shard))}
    for aside in folder.glob(".*.tmp"):
        written = _ASIDE.fullmatch(aside.name)
        if written and (written[1] in stems or (is_main and not written[1].startswith("shard-"))):
            remove_file(aside)


def _missing(folder: Path, plan: Plan, owned: Iterable[int]) -> tuple[list[int], bool]:
    """Return the shards that are not finished, and whether captions of any shard were never embedded, but should be."""
    missing, is_left_to_embed = list[int](), False
    for shard in owned:
        sidecar = sound(folder, shard, plan)
        if sidecar is None:
            missing.append(shard)
        if plan.embeddings and (sidecar is None or sidecar.embeddings is None):
            is_left_to_embed = True
    return missing, is_left_to_embed


class _Tally:
    """A count of the images done by all processes; shards of other processes count once they are finished."""

    def __init__(self, folder: Path, plan: Plan, owned: set[int]) -> None:
        self._folder, self._plan, self._owned = folder, plan, owned
        self._others = [shard for shard in range(plan.num_shards) if shard not in owned]
        self._next_look = 0.0

    def done_before(self, missing: Sequence[int]) -> int:
        """Return the number of rows in shards that are done at the start."""
        kept = self._owned - set(missing)
        return sum(len(self._plan.rows(shard)) for shard in kept) + self._others_done()

    def look(self, bar: Progress, at_once: bool = False) -> None:
        """Add the other processes' progress to the bar, at intervals or ``at_once``."""
        if self._others and (at_once or time.monotonic() >= self._next_look):
            self._next_look = time.monotonic() + POLL_SEC
            bar.update(self._others_done())

    def _others_done(self) -> int:
        done = [shard for shard in self._others if finished(self._folder, shard, self._plan) is not None]
        self._others = [shard for shard in self._others if shard not in done]
        return sum(len(self._plan.rows(shard)) for shard in done)


def _write_shards(
    folder: Path, plan: Plan, batches: Iterator[Encoded], tally: _Tally, bar: Progress, max_skipped_fraction: float
) -> None:
    """Collect the batches of each shard, and write it on a thread while the next one is encoded."""
    collected: list[Encoded] = []
    skipped: list[SkippedImage] = []
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        for batch in batches:
            collected.append(batch)
            skipped += _skips(batch)
            _require_few_skipped(folder, skipped, plan, max_skipped_fraction)
            bar.update(len(batch.examples) + len(batch.skipped))
            tally.look(bar)
            if batch.is_last:
                if writing is not None:
                    writing.result()  # at most one shard is being written, to bound memory
                writing = writer.submit(_write, folder, plan, collected)
                collected = []
        if writing is not None:
            writing.result()


def _skips(batch: Encoded) -> list[SkippedImage]:
    return [SkippedImage(error.source_id, error.reason) for error in batch.skipped]


def _write(folder: Path, plan: Plan, batches: list[Encoded]) -> None:
    """Write one shard, then its sidecar."""
    path = folder / shard_name(batches[0].shard)
    moments = np.concatenate([batch.moments for batch in batches])
    rows = [row for batch in batches for row in batch.rows]
    examples = [example for batch in batches for example in batch.examples]
    labels = [example.label for example in examples]
    _require_storable(path, moments, examples)
    captions = captions_to_store(path, examples, plan.text)
    sums = channel_sums(moments, plan.spec.channels)
    if not sums.is_finite:
        raise ValueError(
            f"The latents of {path} have log-variances up to {moments[:, :, plan.spec.channels :].max()}, whose "
            "variance overflows; are they log-variances?"
        )
    features = [sample for batch in batches if batch.features is not None for sample in batch.features]
    values = np.ascontiguousarray(moments, dtype=np.float16)
    entry, layout = write_shard(path, rows, values, labels, features if plan.teacher is not None else None)
    Sidecar(
        plan=plan.hash,
        entry=entry,
        layout=layout,
        labels=labels,
        source_ids=[example.source_id for example in examples],
        skipped=[skip for batch in batches for skip in _skips(batch)],
        sums=sums,
        captions=captions,
    ).save(folder)


def _require_storable(path: Path, moments: NDArray[np.float32], examples: Sequence[Prepared]) -> None:
    """Raise ValueError for a value that float16 cannot hold, and for a name that is too long for the index."""
    axes = (1, 2, 3, 4)
    largest = np.maximum(moments.max(axes, initial=0), -moments.min(axes, initial=0))  # of each sample
    if len(too_large := np.flatnonzero(largest >= _FLOAT16_OVERFLOW)):
        raise ValueError(
            f"The latent of {examples[too_large[0]].source_id} has the value {largest[too_large[0]]}, but {path} holds "
            "float16, up to 65504; leave that image out."
        )
    for example in examples:
        if len(example.source_id) > MAX_SOURCE_ID:
            raise ValueError(
                f"{example.source_id[:80]}... is a name of {len(example.source_id)} characters, but {INDEX_NAME} holds "
                f"{MAX_SOURCE_ID}; give that image a shorter one."
            )


def _wait_for_all(folder: Path, plan: Plan, owned: range, tally: _Tally, bar: Progress) -> list[Sidecar]:
    """Wait for every shard's sidecar and return them.

    The hashes of other processes' shards are checked, because a damaged shard may still have an old sidecar.
    """
    found: dict[int, Sidecar] = {}
    while len(found) < plan.num_shards:
        for shard in range(plan.num_shards):
            if shard not in found:
                sidecar = (still_finished if shard in owned else sound)(folder, shard, plan)
                if sidecar is not None:
                    found[shard] = sidecar
        tally.look(bar)
        if len(found) < plan.num_shards:
            time.sleep(POLL_SEC)
    tally.look(bar, at_once=True)
    return [found[shard] for shard in range(plan.num_shards)]


def finish(
    folder: Path,
    plan: Plan,
    sidecars: Sequence[Sidecar],
    max_skipped_fraction: float,
    text: TextEncoder | None = None,
) -> Manifest:
    """Merge the sidecars into index and manifest, and delete shards of an earlier, unfinished plan.

    Raises ValueError where more than ``max_skipped_fraction`` of the images could not be read.
    """
    skipped = [skip for sidecar in sidecars for skip in sidecar.skipped]
    _require_few_skipped(folder, skipped, plan, max_skipped_fraction)
    _write_skipped(folder, plan, skipped)
    shards = [shard_name(shard) for shard in range(plan.num_shards)]
    written = {*shards, *(map(embeddings_name, shards) if plan.embeddings else ())}
    for path in folder.glob("shard-*"):
        if _OURS.fullmatch(path.name) and path.name not in written:
            remove_file(path)
            remove_file(sidecar_path(path))
    write_bytes(folder / CLASSES_NAME, classes_text(plan.class_names))
    labels = [label for sidecar in sidecars for label in sidecar.labels]
    source_ids = [name for sidecar in sidecars for name in sidecar.source_ids]
    write_index(folder, labels, source_ids, [sidecar.layout for sidecar in sidecars])
    captions = write_texts(folder, sidecars, plan, text)
    mean, std = channel_statistics([sidecar.sums for sidecar in sidecars])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        plan_hash=plan.hash,
        spec=plan.spec,
        class_names=plan.class_names,
        shards=[sidecar.entry for sidecar in sidecars],
        index_sha256=sha256_of(folder / INDEX_NAME),
        latent_mean=mean,
        latent_std=std,
        num_skipped=len(skipped),
        labels_sha256=sha256_of(folder / LABELS_NAME),
        teacher=plan.teacher,
        captions=captions,
    )
    manifest.save(folder)
    return manifest


def classes_text(class_names: Sequence[str]) -> bytes:
    """Return the content of ``classes.json``."""
    return json.dumps(dict(enumerate(class_names)), indent=1).encode()


def skipped_text(skipped: Sequence[SkippedImage]) -> bytes:
    """Return the content of ``skipped.jsonl``."""
    return "".join(json.dumps(asdict(skip)) + "\n" for skip in skipped).encode()


def _write_skipped(folder: Path, plan: Plan, skipped: Sequence[SkippedImage]) -> None:
    """Write one line for each file of the source that gives no sample; delete the file if there are none."""
    left_out = [SkippedImage(entry.source_id, entry.reason) for entry in plan.left_out]
    if left_out or skipped:
        write_bytes(folder / SKIPPED_NAME, skipped_text([*left_out, *skipped]))
    else:
        (folder / SKIPPED_NAME).unlink(missing_ok=True)


def _require_few_skipped(
    folder: Path, skipped: Sequence[SkippedImage], plan: Plan, max_skipped_fraction: float
) -> None:
    """Raise ValueError where too many images were skipped, or all, after writing the file that lists them.

    Images that the source leaves out, for their format or because they are broken links, count as skipped.
    """
    count, total = len(skipped) + plan.num_images_left_out, len(plan.order) + plan.num_images_left_out
    if count > max_skipped_fraction * total or len(skipped) == len(plan.order):
        _write_skipped(folder, plan, skipped)
        reasons = [entry.reason for entry in plan.left_out if entry.is_image] + [skip.reason for skip in skipped]
        raise ValueError(
            f"{count} of {total} images cannot be read, the last for '{reasons[-1]}', more "
            f"than max_skipped_fraction={max_skipped_fraction} allows; {folder / SKIPPED_NAME} lists them: repair "
            "them, or raise the fraction."
        )
