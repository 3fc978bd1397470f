"""Samplers under XLA: the same images, and a fixed number of programs however many steps they take."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_samples import SAMPLERS, STEPS
from warm_python import FAST_COMPILE, TRAINING, WITH_XLA, run_warm_python

SCRIPT = str(Path(__file__).with_name("tiny_samples.py"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for modules, runtime in ((TRAINING, "accelerate"), (WITH_XLA, "xla")):
        run_warm_python(modules, SCRIPT, str(folder), runtime, cwd=folder, env=FAST_COMPILE)
    return folder


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_are_those_of_accelerate(out: Path, sampler: str) -> None:
    with np.load(out / "accelerate.npz") as ours, np.load(out / "xla.npz") as theirs:
        one, other = ours[sampler].astype(int), theirs[sampler].astype(int)
    assert one.shape == other.shape == (14, 8, 8, 4)
    assert one.std() > 10
    assert np.abs(one - other).max() <= 1  # a rounding boundary may be crossed by float error, not more
    assert (one != other).mean() < 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_steps_of_a_sampler_share_their_programs(out: Path, sampler: str) -> None:
    counts = json.loads((out / "xla.json").read_text())[sampler]
    assert counts["second"] == 0
    assert counts["first"] < STEPS  # one for the network, a few small ones around it
