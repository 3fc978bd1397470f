"""Write and read sidecars: the record of one finished shard, next to it. A sidecar marks its shard as complete."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from core.atomic import write_bytes
from core.names import inside
from core.reading import DamagedFileError, read_regular, sha256_of
from core.records import SEAL, check, parse_object, seal, unseal
from data.channel_sums import ChannelSums
from data.manifest import FORMAT, MAX_SOURCE_ID, LatentSpec, Sha256, ShardEntry, embeddings_name
from data.plan import Plan, shard_name
from data.shard_tars import Layout, facts_of
from data.sources import MAX_CAPTION

Caption = Annotated[str, Field(min_length=1, max_length=MAX_CAPTION)]


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be read, and the reason."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    source_id: str
    reason: str


@dataclass(frozen=True)
class Sidecar:
    """The facts about a shard that manifest and index are made from."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    plan: Sha256  # hash of the plan
    entry: ShardEntry
    layout: Layout
    labels: list[Annotated[int, Field(ge=0)]]
    source_ids: list[Annotated[str, Field(max_length=MAX_SOURCE_ID)]]
    skipped: list[SkippedImage]
    sums: ChannelSums
    captions: list[Annotated[list[Caption], Field(min_length=1)]] | None = None  # of each sample
    embeddings: ShardEntry | None = None  # the file of those of its captions, once it is written

    def save(self, folder: Path) -> None:
        """Write the record with a hash of its content; call it after the shard is written."""
        content = asdict(self)
        for name in ("captions", "embeddings"):
            if content[name] is None:  # else the record is as earlier versions wrote it
                del content[name]
        write_bytes(sidecar_path(folder / self.entry.name), json.dumps(seal(content)).encode())


def sidecar_path(shard: Path) -> Path:
    """Return the path of a shard's record."""
    return shard.with_suffix(".json")


def read_sidecar(folder: Path, shard: str, spec: LatentSpec) -> tuple[Sidecar, bool]:
    """Return the record of the shard of that name, and whether it carries a hash of its content.

    Raises OSError as `open` does, and ValueError where it is damaged: it does not match its hash, has a field of
    another type, or fields that contradict each other. Earlier versions wrote no hash.
    """
    path = inside(folder, sidecar_path(Path(shard)).name, FORMAT)
    content = parse_object(read_regular(path), str(path))
    is_sealed, content = SEAL in content, unseal(content, str(path), required=False)
    check(Sidecar, content, str(path))
    sidecar = Sidecar(
        plan=content["plan"],
        entry=ShardEntry(**content["entry"]),
        layout=Layout(*content["layout"]),
        labels=content["labels"],
        source_ids=content["source_ids"],
        skipped=[SkippedImage(**skip) for skip in content["skipped"]],
        sums=ChannelSums(**content["sums"]),
        captions=content.get("captions"),
        embeddings=ShardEntry(**content["embeddings"]) if content.get("embeddings") else None,
    )
    if fault := _contradiction(sidecar, shard, spec):
        raise DamagedFileError(f"{path} is damaged: {fault}.")
    return sidecar, is_sealed


def _contradiction(sidecar: Sidecar, shard: str, spec: LatentSpec) -> str | None:
    entry, sums = sidecar.entry, sidecar.sums
    values = entry.count * spec.num_orientations * spec.latent_size**2
    if entry.name != shard:
        return f"it is the record of {entry.name!r}"
    if not entry.count == len(sidecar.labels) == len(sidecar.source_ids):
        return f"it has {len(sidecar.labels)} labels and {len(sidecar.source_ids)} names of {entry.count} samples"
    if sidecar.captions is not None and len(sidecar.captions) != entry.count:
        return f"it has captions of {len(sidecar.captions)} of {entry.count} samples"
    file, num_captions = sidecar.embeddings, sum(map(len, sidecar.captions or []))
    if file is not None and (file.name, file.count) != (embeddings_name(shard), num_captions):
        return f"it records {file.count} embeddings in {file.name!r}, not {num_captions} in {embeddings_name(shard)!r}"
    if max(sidecar.labels, default=0) >= spec.num_classes:
        return f"it has the label {max(sidecar.labels)}, but there are {spec.num_classes} classes"
    if not sidecar.layout.fits(entry.count, spec, entry.bytes):
        return f"samples of layout {tuple(sidecar.layout)} are not within the {entry.bytes} bytes of the shard"
    if (sums.count, len(sums.mean), len(sums.square)) != (values, spec.channels, spec.channels):
        return f"its sums are of {sums.count} values of {len(sums.mean)} channels, not {values} of {spec.channels}"
    return None


def finished(folder: Path, shard: int, plan: Plan) -> Sidecar | None:
    """Return the record of a shard that this plan finished, without reading the shard; None where there is none."""
    found = _found(folder, shard, plan)
    return None if found is None else found[0]


def still_finished(folder: Path, shard: int, plan: Plan) -> Sidecar:
    """Return the record of a shard that was finished a moment ago. Raises ValueError where it is no longer."""
    sidecar = finished(folder, shard, plan)
    if sidecar is None:
        raise ValueError(
            f"{sidecar_path(folder / shard_name(shard))} was changed while this job ran; give the same command again."
        )
    return sidecar


def sound(folder: Path, shard: int, plan: Plan) -> Sidecar | None:
    """Return the record as `finished` does, if the shard's hash, labels and layout match it; otherwise None.

    For a record without a hash, the sums of the shard's values must match too, and it must have no captions.
    """
    found = _found(folder, shard, plan)
    if found is None:
        return None
    sidecar, is_sealed = found
    if not is_sealed and sidecar.captions is not None:  # which nothing in the shard confirms
        return None
    try:
        path = inside(folder, sidecar.entry.name, FORMAT)
        if (path.stat().st_size, sha256_of(path)) != (sidecar.entry.bytes, sidecar.entry.sha256):
            return None
        facts = facts_of(path, plan.spec, sidecar.entry.count, with_sums=not is_sealed, teacher=plan.teacher)
    except (OSError, ValueError):
        return None
    agrees = (facts.labels, facts.layout) == (sidecar.labels, sidecar.layout)
    return sidecar if agrees and (facts.sums is None or facts.sums.agrees(sidecar.sums)) else None


def _found(folder: Path, shard: int, plan: Plan) -> tuple[Sidecar, bool] | None:
    try:
        found = read_sidecar(folder, shard_name(shard), plan.spec)
    except (OSError, ValueError):
        return None
    return found if found[0].plan == plan.hash else None
