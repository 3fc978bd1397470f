"""Numbers in docs/ equal those of the committed result lines, and lists in docs/ are complete."""

import json
from typing import Any

import pytest
import torch

from benchmarks.tpu_table import table
from launch.command.app import CONF
from model.dit import DiT, DiTConfig
from runtime.sharding import sharding_of

ROOT = CONF.parent
TPU_LINES = (ROOT / "benchmarks/results/tpu_aot.jsonl").read_text().splitlines()


def test_the_table_of_tpus_is_made_of_the_result_lines() -> None:
    assert len(TPU_LINES) > 0
    assert table(TPU_LINES) in (ROOT / "docs/tpu.md").read_text()


def compiled(slice_name: str, mode: str, recomputes: bool) -> dict[str, Any]:
    """Return the committed line of a case."""
    lines = [json.loads(line) for line in TPU_LINES]
    keys = [(line["slice"], line["mode"], line["activation_checkpointing"]) for line in lines]
    found: dict[str, Any] = lines[keys.index((slice_name, mode, recomputes))]
    return found


def test_xl_2_fits_a_v3_core_in_the_recommended_mode_alone_without_recomputing() -> None:
    assert compiled("v3-8", "zero1", recomputes=False)["fits"]
    assert not compiled("v3-8", "replicated", recomputes=False)["fits"]


def test_fsdp_on_v4_gathers_the_blocks_weights_twice_and_scatters_the_gradients() -> None:
    line = compiled("v4-8", "fsdp", recomputes=True)
    with torch.device("meta"):
        model = DiT(DiTConfig(32, 4, 2, width=1152, depth=28, num_heads=16, num_classes=1000))
    axes = sharding_of(model, 8)
    spread = {name: value.numel() for name, value in model.named_parameters() if any(axes[name])}
    of_blocks = sum(size for name, size in spread.items() if name.startswith("blocks."))
    sent, bf16_bytes = line["collectives"], 2 * sum(spread.values())
    once_more = (
        2 * of_blocks + 2 * spread["label_embedding.weight"]
    )  # in the backward pass; a table is no product: fp32
    assert sent["all-gather"]["bytes"] == bf16_bytes + once_more
    assert sent["reduce-scatter"]["bytes"] == pytest.approx(bf16_bytes, rel=0.01)
    assert sent["all-reduce"]["bytes"] < 0.001 * bf16_bytes  # gradients of vectors


@pytest.mark.parametrize("slice_name", ["v3-128", "v3-256", "v4-8", "v6e-8"])
def test_replicated_sends_the_gradients_in_bf16_and_nothing_else(slice_name: str) -> None:
    line = compiled(slice_name, "replicated", recomputes=False)
    assert line["collectives"].keys() == {"all-reduce"}
    assert line["collectives"]["all-reduce"]["bytes"] == pytest.approx(2 * line["parameters"], rel=0.002)


@pytest.mark.parametrize("group", ["", "path", "prediction", "weighting", "times"])
def test_the_page_on_objectives_lists_every_choice(group: str) -> None:
    page = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
    for path in (CONF / "diffusion" / group).glob("*.yaml"):
        named = f"`{path.stem}`" if group else f"`diffusion={path.stem}`"
        assert any(line.startswith(f"| {named}") for line in page.splitlines()), path
