"""The command line makes averages of any width from the checkpoints of a run."""

from pathlib import Path

import numpy as np
from conftest import TINY_RUN, InProcess

SAMPLE = ["sample", "checkpoint=run", "runtime=cpu", "num_images=20", "sampler.steps=3"]


def images(name: str) -> np.ndarray:
    found: np.ndarray = np.load(f"{name}.npz", allow_pickle=False)["arr_0"].astype(float)
    return found


def test_sample_and_evaluate_take_an_average_of_any_width(digits: Path, tmp_path: Path, in_process: InProcess) -> None:
    kept = ["train/ema=power", "checkpoint_every=2", "keep_checkpoint_every=2"]
    in_process("train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", *kept)
    for weights in ("ema", "width_0.05", "width_0.15", "model"):
        in_process(*SAMPLE, f"weights={weights}", f"out={weights}")
    # The average of a width that was kept is itself, to what float32 leaves of the sum; wider ones are others.
    assert np.abs(images("ema") - images("width_0.05")).max() <= 1
    assert np.abs(images("ema") - images("width_0.15")).mean() > 1
    shown = in_process(*SAMPLE, "weights=width_0.3", "out=x", expect=2)
    assert "The width 0.3 of an average is not in (0, 0.28)" in shown
    shown = in_process(*SAMPLE, "weights=width_wide", "out=x", expect=2)
    assert "weights is 'width_wide', but what follows width_ must be a number such as 0.1" in shown
    measured = ["evaluate", "checkpoint=run", "runtime=cpu", f"data.shards={digits}", "sampler.steps=3"]
    few = ["evaluation.num_images=40", "evaluation.features.epochs=1"]
    in_process(*measured, *few, "weights=width_0.15")
    assert '"weights": "width_0.15"' in (tmp_path / "run/evaluations.jsonl").read_text()


def test_a_run_without_power_averages_has_no_other_width(digits: Path, tmp_path: Path, in_process: InProcess) -> None:
    in_process("train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", "total_steps=10")
    shown = in_process(*SAMPLE, "weights=width_0.1", "out=x", expect=2)
    words = "from which no other width can be computed; train with train/ema=power"
    assert f"has averages without ema.relative_stds, {words}" in shown
