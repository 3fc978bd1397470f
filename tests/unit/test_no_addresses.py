"""No record contains a memory address, which differs in every run and means nothing to a reader."""

import io
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess
from poisoned_shards import poisoned

import evaluation.chunks

ADDRESS = re.compile(rb"[^\n]{0,80} at 0x[0-9a-fA-F]{4,}")
MEASURE = ["evaluation.num_images=8", "sampler.steps=2", "evaluation.features.epochs=1", "runtime=cpu"]
KERNEL = "evaluation.metric.kernel.subset_size=4"
ALL_METRICS = ["metrics=[frechet,kernel,precision_recall,nll]", KERNEL]
TRAIN = ["train", *TINY_RUN, "data.shards=shards", "total_steps=4", "log_every=2", "checkpoint_every=2", *MEASURE]
TRAIN += ["diffusion.schedule.num_steps=100"]  # each of which nll takes
RECORDS = [  # of each kind at least one must be there to be looked at
    "shards/manifest.json",
    "shards/data.json",
    "shards/index.npz",
    "shards/labels.npz",
    "shards/shard-*.json",
    "runs/one/config.yaml",
    "runs/one/checkpoints/*/state.json",
    "runs/one/metrics.jsonl",
    "runs/one/timing.jsonl",
    "runs/one/evaluations.jsonl",
    "runs/one/samples/*.png",
    "runs/one/wandb/*/run-*.wandb",  # wandb's config, history and summary, where it is offline
    "runs/bad/nonfinite_*/*.json",
    "cache/classifier-*/facts.json",
    "cache/reference-*/*.json",
    "chunks/*/chunk-*.json",
    "reference.npz",
    "images.npz",
    "pngs/*",
    "x.npz",
    "weights.pt",
    "folder/model_index.json",
    "runs/report/*",
]


def parts_of(content: bytes) -> Iterator[bytes]:
    """Yield a file's bytes, and those of its packed members."""
    yield content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield from parts_of(archive.read(name))


def addresses(content: bytes) -> list[bytes]:
    return [found for part in parts_of(content) for found in ADDRESS.findall(part)]


@pytest.fixture
def kept_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy chunks aside before a finished evaluation deletes them."""

    def copied_first(path: Path, ignore_errors: bool) -> None:
        shutil.copytree(path, tmp_path / "chunks" / path.name, dirs_exist_ok=True)
        shutil.rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(evaluation.chunks, "rmtree", copied_first)


def save_network(path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    torch.jit.trace(network, torch.zeros(1, 3, 8, 8)).save(str(path))


def test_an_address_is_found_in_a_file_and_in_what_a_file_packs() -> None:
    shown = repr(object()).encode()
    packed = io.BytesIO()
    np.savez_compressed(packed, about=np.array(shown.decode()), text=np.frombuffer(shown, np.uint8))
    assert addresses(shown) == [shown[:-1]]
    assert addresses(packed.getvalue()) == [shown[:-1]]
    assert not addresses(b"at 0x, 0x7f, at 10, what 0x7f00")


@pytest.mark.usefixtures("kept_chunks")
def test_no_job_writes_or_prints_the_address_of_an_object(
    tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    save_network(tmp_path / "net.pt")
    theirs = ["evaluation/features=torchscript", "evaluation.features.file=net.pt", "evaluation.features.image_size=8"]
    evaluate = ["evaluate", "checkpoint=runs/one", *MEASURE]
    jobs = [
        ["encode", "data=digits", "data.shards=shards"],
        ["verify", "data=digits", "data.shards=shards", "repair=true"],
        ["reference", "out=reference.npz", *MEASURE[2:]],
        [*TRAIN, "train/logger=wandb", "sample_every=2", "evaluate_every=2", "sweep_dir=runs", "name=one"],
        [*TRAIN, "train/ema=power", "train/logger=none", "evaluate_every=4", "sweep_dir=runs", "name=two"],
        [*evaluate, *ALL_METRICS, "evaluation.reference=reference.npz", "diffusion/guidance=classifier_free"],
        [*evaluate, "evaluation/image_file=npz", "evaluation.image_file.path=images.npz"],
        [*evaluate, "evaluation/image_file=png", "evaluation.image_file.path=pngs"],
        [*evaluate[:2], *MEASURE[:2], *theirs, "runtime=cpu"],
        ["sample", "checkpoint=runs/one", "num_images=4", "sampler.steps=2", "runtime=cpu", "labels=[3]", "out=x"],
        ["export", "checkpoint=runs/one", "to=reference", "out=weights.pt"],
        ["export", "checkpoint=runs/one", "to=diffusers", "out=folder"],
        ["plan", "model.depth=2"],
        ["report", "sweep=runs", "samples=2", "sampler.steps=2", "runtime=cpu"],
    ]
    shown = {" ".join(words): in_process(*words) for words in jobs}
    poisoned(tmp_path / "shards", tmp_path / "bad", 16 * 2 + 5)
    bad = [*TRAIN, "data.shards=bad", "sweep_dir=runs", "name=bad"]
    shown["diverged"] = in_process(*bad, expect=1)
    shown["replay"] = in_process("train", *(f"replay={path}" for path in Path("runs/bad").glob("nonfinite_*")))
    assert {words: found for words, text in shown.items() if (found := addresses(text.encode()))} == {}
    missing = [kind for kind in RECORDS if not list(tmp_path.glob(kind))]
    assert not missing
    records_of_wandb = next(tmp_path.glob("runs/one/wandb/*/run-*.wandb")).read_bytes()
    assert all(word in records_of_wandb for word in (b"optimizer", b"frechet_distance"))  # it is not packed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {str(path): found for path in files if (found := addresses(path.read_bytes()))} == {}
