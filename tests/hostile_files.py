"""Damage a file in every way, let each job that reads it run, and say what came of it.

A workspace is a folder with a finished run, its shards, references, caches and exports. A trial copies it, damages one
file, runs one job and compares the job's result with that of the undamaged workspace.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import TRAINING, warm
from PIL import Image

from core.records import SEAL, canonical_hash

LIMIT_SEC = 90.0  # a job takes seconds
GOOD = ("same", "recovered", "sentence", "said")
SIZE = 8  # pixels of the images
DATA = [
    "data=folder",
    "data.name=photos",
    "data.source.root=photos",
    f"data.image_size={SIZE}",
    "model/autoencoder=identity",
    "data.shards=shards",
    "data.verify_checksums=true",
]
NETWORK = ["model.width=16", "model.depth=2", "model.num_heads=2", "model.patch_size=4"]
KERNEL = "evaluation.metric.kernel.subset_size=4"
MEASURED = ["evaluation.num_images=8", "sampler.steps=2", "evaluation.features.epochs=1", "runtime=cpu"]
TRAIN = [
    *("train", *DATA, *NETWORK, *MEASURED, "run_dir=runs/run", "group=g", "precision=fp32", "train/logger=none"),
    *("batch_size=8", "log_every=2", "checkpoint_every=2", "sample_every=null", "evaluate_every=4", "total_steps=4"),
]
DUMP = "diverged/nonfinite_00000001"
SAMPLED = ["sampler.steps=2", "num_images=4", "runtime=cpu", "out=out"]
JOBS: dict[str, list[str]] = {
    "resume": [*TRAIN, "total_steps=6", "resume.allow=[total_steps]"],
    "init_from": [*TRAIN, "run_dir=other", "init_from=runs/run", "evaluate_every=null", "total_steps=2"],
    "replay": ["train", f"replay={DUMP}"],
    "sample": ["sample", "checkpoint=runs/run", *SAMPLED],
    "sample_weights": [
        *("sample", "checkpoint=weights.pt", "model/autoencoder=identity", "foreign.num_heads=2", *SAMPLED),
    ],
    "evaluate": ["evaluate", "checkpoint=runs/run", *DATA, *MEASURED, "metrics=[frechet,kernel,nll]", KERNEL],
    "evaluate_reference": [
        *("evaluate", "checkpoint=runs/run", *DATA, *MEASURED, "evaluation.reference=reference.npz"),
        *("metrics=[frechet,precision_recall]", "evaluation.metric.precision_recall.k=1"),
    ],
    "export": ["export", "checkpoint=runs/run", "to=reference", "out=out.pt"],
    "report": ["report", "sweep=runs", "train/logger=none", "samples=0", "runtime=cpu"],
    "verify": ["verify", *DATA],
    "encode": ["encode", *DATA],
    "reference": ["reference", *DATA, "evaluation.features.epochs=1", "out=new.npz", "runtime=cpu"],
}
CHECKPOINT = "runs/run/checkpoints/step_00000004"
TRAINING_JOBS = ("resume", "init_from")
READERS = ("sample", "evaluate", "evaluate_reference", "export", "init_from", "resume")
# Each kind of file, and the jobs that read it.
KINDS: dict[str, tuple[str, ...]] = {
    "runs/run/config.yaml": ("resume", "evaluate", "report"),
    "runs/run/metrics.jsonl": ("resume",),
    "runs/run/timing.jsonl": ("resume",),
    "runs/run/evaluations.jsonl": ("resume", "report"),
    f"{CHECKPOINT}/state.json": READERS,
    f"{CHECKPOINT}/model.safetensors": ("resume",),
    f"{CHECKPOINT}/ema.safetensors": READERS,
    f"{CHECKPOINT}/optimizer.safetensors": ("resume",),
    f"{CHECKPOINT}/metrics.jsonl": ("resume",),
    f"{DUMP}/dump.json": ("replay",),
    "shards/manifest.json": ("verify", "encode", "resume", "evaluate"),
    "shards/index.npz": ("verify", "encode", "resume", "evaluate"),
    "shards/shard-000001.tar": ("verify", "encode", "resume", "evaluate"),
    "shards/shard-000001.json": ("verify", "encode"),
    "shards/classes.json": ("verify", "encode"),
    "cache/classifier-*/model.safetensors": ("evaluate", "evaluate_reference", "reference"),
    "cache/classifier-*/*.json": ("evaluate", "evaluate_reference", "reference"),
    "cache/reference-*/*": ("evaluate_reference",),
    "reference.npz": ("evaluate_reference",),
    "weights.pt": ("sample_weights",),
    "photos/b/1.png": ("encode", "evaluate", "reference"),
}


def results_of(job: str, folder: Path) -> list[Path]:
    """Return the files that a job's result is in."""
    patterns = {
        "resume": ("runs/run/checkpoints/step_00000006/*.safetensors", "runs/run/*.jsonl"),
        "init_from": ("other/checkpoints/*/*.safetensors", "other/metrics.jsonl"),
        "sample": ("out.npz",),
        "sample_weights": ("out.npz",),
        "evaluate": ("runs/run/evaluations.jsonl",),
        "evaluate_reference": ("runs/run/evaluations.jsonl",),
        "export": ("out.pt",),
        "report": ("runs/report/*.csv", "runs/report/figure_8.svg"),
        "encode": ("shards/*.tar", "shards/*.json", "shards/*.npz"),
        "reference": ("new.npz",),
    }
    found = [path for pattern in patterns.get(job, ()) for path in sorted(folder.glob(pattern))]
    return [path for path in found if path.name != "timing.jsonl"]


def digest(job: str, folder: Path, shown: str) -> str:
    """Return a hash over a job's result: the files that it wrote, or for jobs that only tell, what it said."""
    hash_ = hashlib.sha256()
    for path in results_of(job, folder):
        hash_.update(str(path.relative_to(folder)).encode())
        if path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
            hash_.update(b"".join(value.numpy().tobytes() for value in content.values()))
        else:
            hash_.update(path.read_bytes() if path.is_file() else b"-")
    if job in ("replay", "verify"):
        hash_.update(re.sub(r"\r.*|.*/s, in .*", "", shown).encode())  # without bars and their times
    return hash_.hexdigest()


def run_job(job: str, folder: Path) -> tuple[int | None, str]:
    """Return a job's exit code, None where it hung, and what it printed."""
    with tempfile.TemporaryDirectory() as aside:
        output = Path(aside) / "output"
        try:
            code = warm(*TRAINING).start(JOBS[job], folder, output).wait(LIMIT_SEC)
        except subprocess.TimeoutExpired:
            code = None
        return code, output.read_text(errors="replace") if output.exists() else ""


def make_workspace(folder: Path) -> None:
    """Fill a folder with images, shards, a finished run, a diverged one, a reference, weights, caches."""
    generator = np.random.default_rng(0)
    for label in "abcd":
        for number in range(8):
            path = folder / f"photos/{label}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    steps = [
        ["encode", *DATA, "data.samples_per_shard=10"],
        TRAIN,
        [*TRAIN, "run_dir=diverged", "optimizer.lr=1e30", "evaluate_every=null"],
        ["reference", *DATA, "evaluation.features.epochs=1", "out=reference.npz", "runtime=cpu", "num_kept=16"],
        ["export", "checkpoint=runs/run", "to=reference", "out=weights.pt"],
    ]
    JOBS["encode"] = [*JOBS["encode"], "data.samples_per_shard=10"]
    for words in steps:
        with tempfile.TemporaryDirectory() as aside:
            output = Path(aside) / "output"
            code = warm(*TRAINING).start(words, folder, output).wait(LIMIT_SEC)
            assert code == ("run_dir=diverged" in words), output.read_text()
    code, shown = run_job("evaluate_reference", folder)  # which fills the cache
    assert code == 0, shown


def flip(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    place = dice.randrange(8 * len(content))
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def with_numbers(content: bytes, dice: random.Random, value: bytes) -> bytes:
    """Replace a number of a text, or eight bytes in the second half of anything else."""
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
    """Change a field of a JSON record as somebody would who knows how: its hash is right."""
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


def every_trial() -> list[Trial]:
    """Return each kind of file with each damage that it can have and each job that reads it."""
    trials = [
        Trial(kind, damage, job, 0)
        for kind, jobs in KINDS.items()
        for damage in DAMAGES
        for job in jobs
        if not damage.startswith("resealed") or kind.endswith("state.json") or kind.endswith("dump.json")
    ]
    own_content = ("flip", "NaN", "huge", "null")  # an own image is then another image
    return [trial for trial in trials if not (trial.kind.startswith("photos") and trial.damage in own_content)]


def some_trials(count: int, seed: int) -> Iterator[Trial]:
    """Yield trials in an order of their own for each seed, all of them before any comes again with other dice."""
    dice = random.Random(seed)
    round_ = 0
    while count > 0:
        trials = every_trial()
        dice.shuffle(trials)
        for trial in trials[:count]:
            yield Trial(trial.kind, trial.damage, trial.job, seed=1000 * seed + round_)
        count -= len(trials)
        round_ += 1


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


class Fuzzer:
    """Runs trials in copies of one workspace."""

    def __init__(self, folder: Path) -> None:
        self._whole, self._copy = folder / "whole", folder / "copy"
        self._whole.mkdir()
        make_workspace(self._whole)
        self._expected: dict[str, str] = {}

    def run(self, trial: Trial) -> tuple[str, str]:
        """Return what came of a trial, one word, and what the job printed."""
        expected = self._result_of(trial.job)
        folder = self._fresh()
        path = random.Random(f"{trial}").choice(sorted(folder.glob(trial.kind)))
        damage(path, trial)
        code, shown = run_job(trial.job, folder)
        return self._outcome(trial, path.relative_to(folder), code, shown, expected, folder), shown

    def _result_of(self, job: str) -> str:
        if job not in self._expected:
            folder = self._fresh()
            code, shown = run_job(job, folder)
            assert code == 0, f"{job}: {shown}"
            self._expected[job] = digest(job, folder, shown)
        return self._expected[job]

    def _fresh(self) -> Path:
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._whole, self._copy, symlinks=True)
        return self._copy

    def _outcome(self, trial: Trial, path: Path, code: int | None, shown: str, expected: str, folder: Path) -> str:
        names = [path.name, path.parent.name] if path.name[0].isdigit() or "*" in trial.kind else [path.name]
        if trial.kind.startswith(CHECKPOINT):
            names.append(path.parent.name)
        named = any(name in shown for name in names)
        if code is None:
            return "hang"
        if "Traceback" in shown or code < 0:
            return "traceback"
        if code != 0:
            errors = [line for line in shown.splitlines() if "error: " in line]
            return "sentence" if len(errors) == 1 and named else "unnamed"
        if digest(trial.job, folder, shown) == expected:
            return "recovered" if named else "same"
        # Somebody who knows the format may write another checkpoint: it is read as what it says.
        return "said" if named or trial.damage.startswith("resealed") else "different"
