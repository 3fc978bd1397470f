"""Run the trials of `hostile_trials` and classify the outcome of each.

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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from conftest import TRAINING, warm
from hostile_trials import CHECKPOINT, DUMP, Trial, damage
from PIL import Image
from small_text_encoders import write_small_clip
from warm_jobs import WarmJobs

from core.atomic import write_bytes
from core.reading import DamagedFileError
from core.records import parse_object, unseal
from launch.slurm.plan import Plan, PlannedRun, ended_file, new_folder

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
SCHEDULE = "diffusion.schedule.num_steps=20"  # each is a pass through the network where likelihoods are measured
TEXT = ["data/captions=templates", "data/text_encoder=clip", "text_encoder.folder=clip", "text_embeddings=true"]
ENCODE = ["encode", *DATA, "data.samples_per_shard=10", *TEXT]
KERNEL = "evaluation.metric.kernel.subset_size=4"
MEASURED = ["evaluation.num_images=8", "sampler.steps=2", "evaluation.features.epochs=1", "runtime=cpu"]
TRAIN = [
    *(
        "train",
        *DATA,
        *NETWORK,
        *MEASURED,
        SCHEDULE,
        "run_dir=runs/run",
        "group=g",
        "precision=fp32",
        "train/logger=none",
    ),
    *("batch_size=8", "log_every=2", "checkpoint_every=2", "sample_every=null", "evaluate_every=4", "total_steps=4"),
]
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
    "status": ["status", "sweep=runs"],
    "verify": ["verify", *DATA],
    "encode": ENCODE,
    "reference": ["reference", *DATA, "evaluation.features.epochs=1", "out=new.npz", "runtime=cpu"],
}


def results_of(job: str, folder: Path) -> list[Path]:
    """Return the files that contain a job's result."""
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
    """Return a hash over a job's result: the files that it wrote or, for jobs that only print, their output."""
    hash_ = hashlib.sha256()
    for path in results_of(job, folder):
        hash_.update(str(path.relative_to(folder)).encode())
        if path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
            hash_.update(b"".join(value.numpy().tobytes() for value in content.values()))
        else:
            hash_.update(placeless(path, folder) if path.is_file() else b"-")
    if job in ("replay", "status", "verify"):
        hash_.update(re.sub(r"\r.*|.*/s, in .*", "", shown).encode())  # without bars and their times
    return hash_.hexdigest()


def placeless(path: Path, folder: Path) -> bytes:
    """Return a file's content, for a record without the field that names the copy of the workspace."""
    content = path.read_bytes()
    if path.name != "data.json":
        return content
    try:
        fields = unseal(parse_object(content, path.name), path.name)
    except DamagedFileError:
        return content
    return json.dumps(fields).replace(str(folder.resolve()), "").encode()


class Runner:
    """Runs jobs in forks of a process that has imported their modules, two at a time on two cores."""

    def __init__(self) -> None:
        first = warm(*TRAINING)
        both = [first, first.twin()] if len(os.sched_getaffinity(0)) > 1 else [first]
        self._count, self._idle = len(both), SimpleQueue[WarmJobs]()
        for jobs in both:
            self._idle.put(jobs)

    def run(self, words: list[str], folder: Path) -> tuple[int | None, str]:
        """Return a job's exit code, or None if it hung, and its output."""
        jobs = self._idle.get()
        try:
            with tempfile.TemporaryDirectory() as aside:
                output = Path(aside) / "output"
                try:
                    code: int | None = jobs.start(words, folder, output).wait(LIMIT_SEC)
                except subprocess.TimeoutExpired:
                    code = None
                return code, output.read_text(errors="replace") if output.exists() else ""
        finally:
            self._idle.put(jobs)

    def each(self, function: Callable[[Any], Any], of: Iterable[Any]) -> Iterator[Any]:
        """Yield the result of a function for each item, in order, while it already runs on later items."""
        with ThreadPoolExecutor(self._count) as threads:
            yield from threads.map(function, of)


def make_workspace(folder: Path, runner: Runner) -> None:
    """Fill a folder with images, an encoder, shards, a finished run, a diverged one, a reference, weights, caches."""
    write_small_clip(folder / "clip")
    generator = np.random.default_rng(0)
    for label in "abcd":
        for number in range(8):
            path = folder / f"photos/{label}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)).save(path)

    def make(words: list[str]) -> None:
        code, shown = runner.run(words, folder)
        assert code == ("run_dir=diverged" in words), shown

    make(ENCODE)
    make(TRAIN)
    steps = [
        ["reference", *DATA, "evaluation.features.epochs=1", "out=reference.npz", "runtime=cpu", "num_kept=16"],
        [*TRAIN, "run_dir=diverged", "optimizer.lr=1e30", "evaluate_every=null", "log_every=1"],
        ["export", "checkpoint=runs/run", "to=reference", "out=weights.pt"],
    ]
    list(runner.each(make, steps))
    make(JOBS["evaluate_reference"])  # which fills the cache
    submitted = Plan("encode", str(folder), [PlannedRun("encode", DATA)], shares=1)
    ended, _ = new_folder(folder / "runs", submitted)
    write_bytes(ended_file(ended, 0, 0), b"0\n")


class Fuzzer:
    """Runs trials, each in a copy of one workspace."""

    def __init__(self, folder: Path) -> None:
        self._whole, self._copies = folder / "whole", folder / "copies"
        self._whole.mkdir()
        self._copies.mkdir()
        self._runner = Runner()
        make_workspace(self._whole, self._runner)
        self._expected: dict[str, str] = {}

    def run(self, trials: list[Trial]) -> Iterator[tuple[Trial, str, str]]:
        """Yield each trial with its outcome in one word, and the job's output."""
        jobs = list(dict.fromkeys(trial.job for trial in trials))
        self._expected = dict(zip(jobs, self._runner.each(self._result_of, jobs), strict=True))
        for trial, (outcome, shown) in zip(trials, self._runner.each(self._run, trials), strict=True):
            yield trial, outcome, shown

    def _result_of(self, job: str) -> str:
        with self._copy() as folder:
            code, shown = self._runner.run(JOBS[job], folder)
            assert code == 0, f"{job}: {shown}"
            return digest(job, folder, shown)

    def _run(self, trial: Trial) -> tuple[str, str]:
        with self._copy() as folder:
            path = random.Random(f"{trial}").choice(sorted(folder.glob(trial.kind)))
            damage(path, trial)
            code, shown = self._runner.run(JOBS[trial.job], folder)
            return self._outcome(trial, path.relative_to(folder), code, shown, folder), shown

    @contextmanager
    def _copy(self) -> Iterator[Path]:
        """Lend a copy of the workspace."""
        with tempfile.TemporaryDirectory(dir=self._copies) as folder:
            yield Path(shutil.copytree(self._whole, Path(folder) / "copy", symlinks=True))

    def _outcome(self, trial: Trial, path: Path, code: int | None, shown: str, folder: Path) -> str:
        names = [path.name, path.parent.name] if "*" in trial.kind else [path.name]
        if trial.kind.startswith(CHECKPOINT):
            names.append(path.parent.name)
        if trial.kind.startswith("photos"):
            names.append("the images")  # a changed image of the user's own is another image, so results differ
        named = any(name in shown for name in names)
        if code is None:
            return "hang"
        if "Traceback" in shown or code < 0:
            return "traceback"
        if code != 0:
            errors = [line for line in shown.splitlines() if "error: " in line]
            return "sentence" if len(errors) == 1 and named else "unnamed"
        if digest(trial.job, folder, shown) == self._expected[trial.job]:
            return "recovered" if named else "same"
        # Anyone who knows the format may write another valid checkpoint, which is then read.
        return "said" if named or trial.damage.startswith("resealed") else "different"
