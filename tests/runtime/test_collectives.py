"""Devices exchange only what they must in a step, by the compiled program of XLA's CPU backend."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_run import Case
from warm_python import FAST_COMPILE, WITH_XLA, run_warm_python

from benchmarks.hlo_text import collectives, slices_of
from model.dit import DiT
from runtime.sharding import sharding_of

DUMP = "--xla_dump_hlo_as_text --xla_dump_hlo_pass_re=spmd.* --xla_dump_to="
COMPILED, PARTITIONED = "cpu_after_optimizations", "after_spmd-partitioning"
BATCH_SIZE = 64
NUM_METRICS = 3 + 2 * 4  # loss, mse and vlb; sum and count of the loss in each quarter of t: one number each


def program(folder: Path, stage: str, devices: int, mode: str, block: str) -> str:
    """Return the step on this many virtual devices: the largest program that XLA dumps at a stage."""
    dump = folder / f"{devices}-{mode}-{block}"
    settings = {"cpu_devices": devices, "mode": mode}
    case = {"name": "x", "runtime": "xla", "block": block, "steps": 1, "batch_size": BATCH_SIZE, "settings": settings}
    words = [str(Path(__file__).with_name("tiny_run.py")), str(folder), json.dumps([case])]
    run_warm_python(WITH_XLA, *words, cwd=folder, env={"XLA_FLAGS": f"{FAST_COMPILE['XLA_FLAGS']} {DUMP}{dump}"})
    return max(dump.glob(f"*{stage}*.txt"), key=lambda path: path.stat().st_size).read_text()


def shapes_of(model: DiT) -> Counter[tuple[int, ...]]:
    """Return the parameters' shapes, each sorted, since the compiler may transpose."""
    return Counter(tuple(sorted(parameter.shape)) for parameter in model.parameters())


def sums_kept_in_parts(text: str, devices: int) -> Counter[tuple[int, ...]]:
    """Return the shapes of the sums over devices of which each device keeps only its own part.

    Such a sum is a reduce-scatter in two instructions. PyTorch/XLA's CPU backend has no pass that merges them into one;
    the compiler for TPUs has.
    """
    kept = Counter()
    for one in collectives(text):
        if one.kind == "all-reduce" and (pieces := slices_of(text, one.name)):
            (whole,) = one.shapes
            assert len(pieces) == 1
            assert sorted(a // b for a, b in zip(whole, pieces[0], strict=True)) == [1, devices]
            kept[tuple(sorted(whole))] += 1
    return kept


def table_of(model: DiT) -> Counter[tuple[int, ...]]:
    """Return the shape of the label table: rows of its gradient are exchanged, which is less than the table."""
    return Counter({tuple(sorted(model.label_embedding.weight.shape)): 1})


@pytest.mark.parametrize("block", ["AdaLNZeroBlock", "CrossAttentionBlock"])
def test_replicated_exchanges_the_gradients_and_nothing_else(tmp_path: Path, block: str) -> None:
    model = Case("x", "xla", block).model()
    gradient_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    for devices in (8, 64) if block == "AdaLNZeroBlock" else (8,):
        found = collectives(program(tmp_path, COMPILED, devices, "replicated", block))
        assert {one.kind for one in found} == {"all-reduce"}
        assert sum(one.bytes for one in found) == gradient_bytes + 4 * NUM_METRICS
        sent = Counter(tuple(sorted(shape)) for one in found for shape in one.shapes)
        assert sent == shapes_of(model) + Counter({(): NUM_METRICS})


def test_fsdp_gathers_each_weight_once_and_scatters_each_gradient(tmp_path: Path) -> None:
    devices, model = 8, Case("x", "xla").model()
    text = program(tmp_path, PARTITIONED, devices, "fsdp", "AdaLNZeroBlock")
    found, axes = collectives(text), sharding_of(model, devices)
    spread = {name: parameter for name, parameter in model.named_parameters() if any(axes[name])}
    weights = Counter(tuple(sorted(parameter.shape)) for parameter in spread.values())
    gathered = Counter(tuple(sorted(one.shapes[0])) for one in found if one.kind == "all-gather")
    assert weights <= gathered
    beside = gathered - weights  # labels and timesteps, a few numbers for each image
    assert sum(beside.values()) <= 2
    assert sums_kept_in_parts(text, devices) == weights - table_of(model)
    whole_bytes = sum(4 * p.numel() for name, p in model.named_parameters() if not any(axes[name]))
    kept_whole = [one for one in found if one.kind == "all-reduce" and not slices_of(text, one.name)]
    scalars = [one for one in kept_whole if one.shapes == ((),)]
    assert sum(one.bytes for one in kept_whole) - 4 * len(scalars) == whole_bytes


def test_zero1_keeps_a_part_of_each_gradient_and_gathers_each_updated_weight(tmp_path: Path) -> None:
    devices, model = 4, Case("x", "xla", "AdaLNBlock").model()
    text = program(tmp_path, PARTITIONED, devices, "zero1", "AdaLNBlock")
    found, axes = collectives(text), sharding_of(model, devices)
    spread = {name: parameter for name, parameter in model.named_parameters() if any(axes[name])}
    weights = Counter(tuple(sorted(parameter.shape)) for parameter in spread.values())
    labels = Counter({(1, BATCH_SIZE): 1})
    assert Counter(tuple(sorted(one.shapes[0])) for one in found if one.kind == "all-gather") == weights + labels
    assert sums_kept_in_parts(text, devices) == weights - table_of(model)
    assert [one.kind for one in found].count("all-to-all") == 1
