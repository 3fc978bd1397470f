"""The encode job as users start it: killed, in several processes, on a full disk, from the command line."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from pictures import make_autoencoder, make_image_folder
from small_text_encoders import write_small_clip
from warm_python import TRAINING, run_warm_python, run_with_little_room, start_warm_python

from data.manifest import Manifest

KILLS = int(os.environ.get("DITSCALE_KILLS", "6"))  # `make soak` asks for more
SHARDS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 96 images, a small random autoencoder and a small random text encoder."""
    folder = tmp_path_factory.mktemp("inputs")
    make_image_folder(folder / "images", per_class=32)
    make_autoencoder(folder / "autoencoder")
    write_small_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def words(inputs: Path) -> list[str]:
    return [
        "data=folder",
        "data.name=animals",
        f"data.source.root={inputs / 'images'}",
        f"data.autoencoder.pretrained={inputs / 'autoencoder'}",
        "data.autoencoder.precision=fp32",
        "data.image_size=32",
        "data/captions=templates",
        "data/text_encoder=clip",
        f"text_encoder.folder={inputs / 'clip'}",
        "text_embeddings=true",
        "data.samples_per_shard=8",
        "data.shards=shards",
        "batch_size=4",
        "threads=2",
    ]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files that an undisturbed job of one process writes."""
    folder = tmp_path_factory.mktemp("whole")
    shown = encoding("encode", *words, cwd=folder)
    assert "96 samples of 3 classes in 12 shards" in shown
    return contents(folder / "shards")


def encoding(job: str, *words: str, cwd: Path, expect: int = 0) -> str:
    """Run a job in a process that has already imported diffusers, since the import takes longer than these jobs do."""
    return run_warm_python(TRAINING, "-m", "launch.cli", job, *words, cwd=cwd, expect=expect)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(".lock")}


def encoded_by(processes: int, words: list[str], cwd: Path) -> str:
    """Encode in several processes, started as torchrun starts them."""
    return run_warm_python(TRAINING, "-m", "launch.cli", "encode", *words, cwd=cwd, ranks=processes)


def test_three_processes_write_the_same_bytes_as_one(whole: dict[str, bytes], words: list[str], tmp_path: Path) -> None:
    shown = encoded_by(3, words, tmp_path)
    assert shown.count("96 samples of 3 classes in 12 shards") == 1
    assert contents(tmp_path / "shards") == whole


def test_the_bar_of_the_first_process_counts_the_images_of_all(
    whole: dict[str, bytes], words: list[str], tmp_path: Path
) -> None:
    """Use two processes; each finds two of its six shards done, and the first may see more that the other finishes."""
    (tmp_path / "shards").mkdir()
    for shard in range(4):
        for name in (f"shard-{shard:06d}.tar", f"shard-{shard:06d}.json"):
            (tmp_path / "shards" / name).write_bytes(whole[name])
    shown = encoded_by(2, words, tmp_path)
    lines = re.findall(r"encode: (\d+)/(\d+) img \((\d+)%\), (\S+) img/s, (?:in )?(\d\d:\d\d)", shown)
    assert {total for _, total, *_ in lines} == {"96"}
    done = [int(images) for images, *_ in lines]
    assert done == sorted(done)  # one bar alone
    images, _, percent, rate, _ = lines[-1]
    assert (images, percent) == ("96", "100")  # of which this process made at most 32
    assert 0 < float(rate) < 1e6
    assert contents(tmp_path / "shards") == whole


def num_finished(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json"))) + len(list(folder.glob("shard-*.npz")))


def test_a_job_killed_at_random_moments_ends_with_the_same_bytes(
    whole: dict[str, bytes], words: list[str], tmp_path: Path
) -> None:
    """Kill each job between the first and the fifth file that it finishes; no partial file is ever seen.

    These are shards, then the embeddings of their captions.
    """
    chance = random.Random(0)
    folder = tmp_path / "shards"
    kills, in_text, job = 0, 0, ("-m", "launch.cli", "encode", *words)
    while kills < KILLS:
        target = num_finished(folder) + chance.randrange(1, 5)
        if target >= 2 * SHARDS:  # nearly done: damage it, so that there is work left for the next kills
            for path in sorted(folder.glob("shard-*.tar"))[: SHARDS // 2]:
                path.write_bytes(b"damaged")
            (folder / "manifest.json").unlink(missing_ok=True)
            for path in sorted(folder.glob("shard-*.json"))[: SHARDS // 2]:
                path.unlink()
            continue
        process = start_warm_python(TRAINING, *job, cwd=tmp_path, output=tmp_path / "log")
        while num_finished(folder) < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        for path in (*folder.glob("shard-*.tar"), *folder.glob("shard-*.npz")):
            assert path.read_bytes() in (whole[path.name], b"damaged"), path.name
        in_text += bool(list(folder.glob("shard-*.npz")))
    assert in_text or KILLS < 6
    encoding("encode", *words, cwd=tmp_path)
    assert contents(folder) == whole


@pytest.mark.parametrize("processes", [1, 2])
def test_what_killed_jobs_were_writing_is_removed(
    whole: dict[str, bytes], words: list[str], tmp_path: Path, processes: int
) -> None:
    """Leave a temporary file of every file, named as `core.atomic` names it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in (*whole, "skipped.jsonl"):
        (folder / f".{name}.1234.tmp").write_bytes(b"half")
    encoded_by(processes, words, tmp_path)
    assert contents(folder) == whole


def test_a_disk_that_fills_up_leaves_no_half_shard_and_the_same_command_continues(
    whole: dict[str, bytes], words: list[str], tmp_path: Path
) -> None:
    """Limit the size of files, which looks like a full disk to a writer: half of a shard fits, then writing fails."""
    half = len(whole["shard-000000.tar"]) // 2
    shown = run_with_little_room(TRAINING, half, "encode", *words, cwd=tmp_path, expect=2)
    assert "cannot be written: File too large; free some space, then give the same command again" in shown
    assert not list((tmp_path / "shards").glob("*.tar*"))
    assert not list((tmp_path / "shards").glob(".*.tmp"))
    encoding("encode", *words, cwd=tmp_path)
    assert contents(tmp_path / "shards") == whole


def test_verify_and_repair_from_the_command_line(whole: dict[str, bytes], words: list[str], tmp_path: Path) -> None:
    encoding("encode", *words, cwd=tmp_path)
    assert "12 shards with 96 samples match the manifest" in encoding("verify", *words, cwd=tmp_path)
    path = tmp_path / "shards/shard-000004.tar"
    path.write_bytes(path.read_bytes()[:1000])
    shown = encoding("verify", "data.shards=shards", cwd=tmp_path, expect=2)
    assert "shard-000004.tar has 1000 bytes, not" in shown
    assert (
        "1 of 42 files in shards are damaged: shard-000004.tar" in shown
    )  # 12 shards, sidecars, embeddings, and 6 more
    assert "match the manifest" in encoding("verify", *words, "repair=true", cwd=tmp_path)
    assert contents(tmp_path / "shards") == whole


def test_a_model_trains_on_encoded_images_and_its_samples_are_decoded(words: list[str], tmp_path: Path) -> None:
    """Run from images to latents to a run to pictures, with an autoencoder of four channels."""
    encoding("encode", *words, cwd=tmp_path)
    others = ("source", "captions", "text_encoder")
    data = [word for word in words if word.startswith("data") and not any(other in word for other in others)]
    size = ["model.width=16", "model.depth=1", "model.num_heads=2", "model.patch_size=4", "batch_size=8"]
    steps = ["total_steps=4", "log_every=2", "checkpoint_every=2", "sampler.steps=2", "sample_every=4"]
    encoding("train", *data, *size, *steps, "train/logger=none", "run_dir=run", "precision=fp32", cwd=tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    encoding("sample", "checkpoint=run", "num_images=3", "sampler.steps=2", "out=pictures", cwd=tmp_path)
    assert (tmp_path / "pictures.png").stat().st_size > 100
    spec = Manifest.load(tmp_path / "shards").spec
    assert (spec.latent_size, spec.channels, spec.crop, spec.flip) == (16, 4, "center", True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.image_size=33", "data.image_size 33 is not a multiple of 2"),
        ("data.autoencoder.pretrained=absent", "The autoencoder 'absent' cannot be loaded"),
        ("data.source.root=absent", "There are no files in absent"),
        ("data.source.root=null", "data.source.root is missing"),
        ("data.shards=s3://bucket/x", "shards are written to a local folder"),
        ("device=cuda", "has no GPU"),
        ("max_skipped_fraction=-1", "max_skipped_fraction is -1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], tmp_path: Path, change: str, sentence: str
) -> None:
    shown = encoding("encode", *words, change, cwd=tmp_path, expect=2)
    assert sentence in shown
    assert "Traceback" not in shown
