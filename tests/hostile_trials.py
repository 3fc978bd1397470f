"""Define the trials: each combination of a kind of file, a kind of damage and a job that reads the file."""

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.records import SEAL, canonical_hash

DUMP = "diverged/nonfinite_00000001"
CHECKPOINT = "runs/run/checkpoints/step_00000004"
TRAINING_JOBS = ("resume", "init_from")
READERS = ("sample", "evaluate", "evaluate_reference", "export", "init_from", "resume")
# Each kind of file, and the jobs that read it.
KINDS: dict[str, tuple[str, ...]] = {
    "runs/run/config.yaml": ("resume", "evaluate", "report"),
    "runs/run/metrics.jsonl": ("resume",),
    "runs/run/timing.jsonl": ("resume",),
    "runs/run/evaluations.jsonl": ("resume", "report"),
    "runs/run/status.json": ("status",),
    "runs/slurm/*/sweep.json": ("status",),
    "runs/slurm/*/ended/0/0": ("status",),
    f"{CHECKPOINT}/state.json": READERS,
    f"{CHECKPOINT}/model.safetensors": ("resume",),
    f"{CHECKPOINT}/ema.safetensors": READERS,
    f"{CHECKPOINT}/optimizer.safetensors": ("resume",),
    f"{CHECKPOINT}/metrics.jsonl": ("resume",),
    f"{DUMP}/dump.json": ("replay",),
    "shards/manifest.json": ("verify", "encode", "resume", "evaluate"),
    "shards/index.npz": ("verify", "encode"),
    "shards/labels.npz": ("verify", "encode", "resume", "evaluate"),
    "shards/captions.npz": ("verify", "encode"),
    "shards/shard-000001.tar": ("verify", "encode", "resume", "evaluate"),
    "shards/shard-000001.json": ("verify", "encode"),
    "shards/shard-000001-text.npz": ("verify", "encode"),
    "shards/classes.json": ("verify", "encode"),
    "cache/classifier-*/model.safetensors": ("evaluate", "evaluate_reference", "reference"),
    "cache/classifier-*/*.json": ("evaluate", "evaluate_reference", "reference"),
    "cache/reference-*/*": ("evaluate_reference",),
    "reference.npz": ("evaluate_reference",),
    "weights.pt": ("sample_weights",),
    "photos/b/1.png": ("encode", "evaluate", "reference"),
}


def flip(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    place = dice.randrange(8 * len(content))
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def with_numbers(content: bytes, dice: random.Random, value: bytes) -> bytes:
    """Replace a number in a text, or eight bytes in the second half of any other file."""
    numbers = list(re.finditer(rb"(?<=[ :\[,])-?\d+\.?\d*(?:e-?\d+)?(?=[,\n\]} ])", content))
    if numbers and b"\0" not in content:
        found = dice.choice(numbers)
        return content[: found.start()] + value + content[found.end() :]
    place = dice.randrange(len(content) // 2, max(len(content) // 2 + 1, len(content) - 8))
    pattern = {b"NaN": b"\xff" * 8, b"null": b"\0" * 8}.get(value, b"\xff\xff\xef\x7f" * 2)
    return content[:place] + pattern + content[place + 8 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes] | None] = {
    "flip": flip,
    "cut": lambda content, dice: content[: dice.randrange(1, len(content))],
    "emptied": lambda content, dice: b"",
    "folder": None,
    "pipe": None,
    "device": None,
    "NaN": lambda content, dice: with_numbers(content, dice, b"NaN"),
    "huge": lambda content, dice: with_numbers(content, dice, dice.choice([b"1e400", b"9" * 400, b"10" + b"0" * 17])),
    "null": lambda content, dice: with_numbers(content, dice, b"null"),
    "resealed null": lambda content, dice: resealed(content, dice, None),
    "resealed huge": lambda content, dice: resealed(content, dice, 10**18),
    "resealed deep": lambda content, dice: resealed(content, dice, [[[{"_target_": "os.getcwd"}]]]),
}


def resealed(content: bytes, dice: random.Random, value: Any) -> bytes:
    """Change a field of a JSON record and update its hash, as an informed attacker would."""
    record = json.loads(content)
    assert isinstance(record, dict)
    record.pop(SEAL, None)
    into: Any = record
    key = dice.choice(list(into))
    while isinstance(into[key], dict) and into[key] and dice.random() < 0.7:
        into, key = into[key], dice.choice(list(into[key]))
    into[key] = value
    return json.dumps({**record, SEAL: canonical_hash(record)}).encode()


@dataclass(frozen=True)
class Trial:
    """One file damaged in one way, read by one job."""

    kind: str
    damage: str
    job: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind} | {self.damage} | {self.job} | seed {self.seed}"

    def parts(self) -> set[tuple[str, ...]]:
        """Return what the trial covers: its kind, damage and job, and each pair of these."""
        kind, damage, job = ("kind", self.kind), ("damage", self.damage), ("job", self.job)
        return {kind, damage, job, (*kind, *damage), (*kind, *job), (*damage, *job)}


def every_trial() -> list[Trial]:
    """Return each kind of file with each damage that it can have and each job that reads it."""
    trials = [
        Trial(kind, damage, job, 0)
        for kind, jobs in KINDS.items()
        for damage in DAMAGES
        for job in jobs
        if not damage.startswith("resealed") or kind.endswith("state.json") or kind.endswith("dump.json")
    ]
    own_content = ("flip", "NaN", "huge", "null")  # a changed image of the user's own is another image
    return [trial for trial in trials if not (trial.kind.startswith("photos") and trial.damage in own_content)]


def some_trials(count: int, seed: int) -> Iterator[Trial]:
    """Yield trials in an order that the seed determines: all of them, then all again with other random damage."""
    dice = random.Random(seed)
    round_ = 0
    while count > 0:
        trials = every_trial()
        dice.shuffle(trials)
        for trial in trials[:count]:
            yield Trial(trial.kind, trial.damage, trial.job, seed=1000 * seed + round_)
        count -= len(trials)
        round_ += 1


def covering_trials(count: int) -> list[Trial]:
    """Return the same trials each time: each kind with each job that reads it, then those that cover most others."""
    trials, chosen, covered = every_trial(), list[Trial](), set[tuple[str, ...]]()
    uses = Counter[str]()

    def worth(trial: Trial) -> tuple[bool, int, int]:
        is_new_reader = ("kind", trial.kind, "job", trial.job) not in covered
        return is_new_reader, len(trial.parts() - covered), -uses[trial.damage]

    for _ in range(count):
        best = max(trials, key=worth)  # the first of equals
        trials.remove(best)
        chosen.append(best)
        covered |= best.parts()
        uses[best.damage] += 1
    return chosen


def damage(path: Path, trial: Trial) -> None:
    change = DAMAGES[trial.damage]
    content = path.read_bytes() or b"0"  # of an empty file, such as a lock
    path.unlink()
    if change is not None:
        path.write_bytes(change(content, random.Random(f"{trial}")))
    elif trial.damage == "folder":
        path.mkdir()
    elif trial.damage == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
