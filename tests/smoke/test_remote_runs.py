"""A run in a bucket, as a user types it, continues on another machine without local files."""

import json
import shutil
import signal
from pathlib import Path

from conftest import TINY_RUN, ditscale, warm
from s3_server import BUCKET, s3_server
from safetensors.torch import load
from warm_jobs import TRAINING

from core import remote
from train.mirror import LOCK

URL = f"s3://{BUCKET}/runs/tiny"
STEPS = 150
PARTS = ("model", "ema", "optimizer")


def test_a_run_in_a_bucket_survives_the_loss_of_its_machine(digits: Path, tmp_path: Path) -> None:
    """Kill a run, lose its disk and continue it elsewhere to the bits of a run on a disk; then sample by its URL."""
    words = [*TINY_RUN, f"data.shards={digits}", "run_dir=run", f"total_steps={STEPS}", "sample_every=50"]
    words.append("sampler.steps=2")
    here, there, plain = (tmp_path / name for name in ("here", "there", "plain"))
    for folder in (here, there, plain):
        folder.mkdir()
    ditscale("train", *words, cwd=plain)
    with s3_server():
        words.append(f"remote_dir={URL}")
        process = warm(*TRAINING).start(["train", *words], here, tmp_path / "log")
        while not any(name.endswith("state.json") for name in remote.list_tree(URL)):
            assert process.poll() is None, (tmp_path / "log").read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
        shutil.rmtree(here)
        assert LOCK in remote.list_tree(URL)  # the killed run's, which is seen to be dead
        shown = ditscale("train", *words, cwd=there)
        assert f"step {STEPS}" in shown
        found = {name: remote.read_bytes(f"{URL}/{name}") for name in remote.list_tree(URL)}
        ditscale("sample", f"checkpoint={URL}", "sampler.steps=2", "num_images=4", "out=grid", cwd=tmp_path)
    last = f"checkpoints/step_{STEPS:08d}"
    for part in PARTS:
        assert found[f"{last}/{part}.safetensors"] == (plain / "run" / last / f"{part}.safetensors").read_bytes(), part
        assert load(found[f"{last}/{part}.safetensors"])
    for name in ("metrics.jsonl", f"samples/step_{STEPS:08d}.png"):
        assert found[name] == (plain / "run" / name).read_bytes(), name
    assert json.loads(found[f"{last}/state.json"])["step"] == STEPS
    assert LOCK not in found
    assert (tmp_path / "grid.png").exists()
