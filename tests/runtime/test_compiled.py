"""A compiled network trains and measures the same as an eager one, in few compilations.

All use one cache of compiled kernels, the user's: what the C++ compiler makes once for all of them, such as
precompiled headers, takes half a minute.
"""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_RUN, ditscale, json_lines
from test_killed_evaluations import WORDS
from test_one_run import assert_same_run, case, facts_of, train
from warm_python import TRAINING, run_warm_python

CXX = os.environ.get("CXX", "g++")  # as torch.compile chooses
COUNTED = """
import torch._inductor.config
from launch import cli
torch._inductor.config.cpp.vec_isa_ok = False  # as the other test, with which it shares precompiled headers
cli.main()
from torch._dynamo.utils import counters
cached = [counters["inductor"][f"fxgraph_cache_{outcome}"] for outcome in ("hit", "miss", "bypass")]
print("graphs compiled:", counters["stats"]["unique_graphs"], "by inductor:", sum(cached))
"""

pytestmark = pytest.mark.skipif(
    shutil.which(CXX) is None, reason=f"torch.compile needs a C++ compiler, and there is no {CXX}"
)


def images(file: str) -> list[str]:
    return ["evaluation/image_file=npz", f"evaluation.image_file.path={file}"]


def test_one_compilation_serves_all_equal_units_and_gives_the_same_run(tmp_path: Path) -> None:
    """Units whose activations are kept, units that are recomputed, and a network in one graph."""
    settings = {"compile": True}
    aligned = {"depth": 2, "aligned_steps": 2}  # the last step without REPA
    kept = case("kept", "adaln_zero", "accelerate", settings=settings, **aligned)
    recomputed = case("recomputed", "deep", "accelerate", activation_checkpointing=True, settings=settings)
    plain = [case("plain", "adaln_zero", "plain", **aligned), case("plain-deep", "deep", "plain")]
    # Traced, without kernels: those of a whole network take long to compile.
    in_one_graph = {"settings": {"compile": "whole"}, "backend": "aot_eager"}
    whole = case("whole", "adaln_zero", "accelerate", **in_one_graph, **aligned)
    train([{**one, "steps": 3} for one in (*plain, kept, recomputed, whole)], tmp_path)
    assert_same_run(tmp_path, "kept", "plain")
    assert facts_of(tmp_path, "kept")["of_training"] == {"compilations": 1, "graph_breaks": 0}  # of two blocks
    assert_same_run(tmp_path, "whole", "plain")
    assert facts_of(tmp_path, "whole")["of_training"] == {"compilations": 1, "graph_breaks": 0}  # of the network
    assert_same_run(tmp_path, "recomputed", "plain-deep")
    # One for the way down, one for the way up: two units each, of one class but not of one shape.
    assert facts_of(tmp_path, "recomputed")["of_training"] == {"compilations": 2, "graph_breaks": 0}


def test_a_compiled_network_gives_the_same_images_to_rounding(digits: Path, tmp_path: Path) -> None:
    ditscale("train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", "total_steps=10", cwd=tmp_path)
    ditscale("evaluate", *WORDS, *images("plain.npz"), cwd=tmp_path)
    words = ["evaluate", *WORDS, *images("compiled.npz"), "compile=true"]
    shown = run_warm_python(TRAINING, "-c", COUNTED, *words, cwd=tmp_path)
    found = re.search(r"graphs compiled: (\d+) by inductor: (\d+)", shown)
    assert found is not None, shown
    assert min(map(int, found.groups())) > 0, shown
    with np.load(tmp_path / "plain.npz") as plain, np.load(tmp_path / "compiled.npz") as again:
        difference = np.abs(plain["arr_0"].astype(int) - again["arr_0"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    one, other = json_lines(tmp_path / "run/evaluations.jsonl")
    assert other["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-3)
