"""XL/2's step is traced for many devices without weights, as `benchmarks/tpu_aot.py` compiles it for TPUs."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from warm_python import WITH_XLA, run_warm_python

from launch.command.app import CONF
from model.dit import DiT, DiTConfig
from runtime.sharding import Axes, sharding_of

DEVICES = 8
EVERY_DEVICE = ",".join(map(str, range(DEVICES)))
BATCH = f"{{devices=[8,1,1,1]{EVERY_DEVICE}}}"


def lowered(folder: Path, *overrides: str) -> str:
    environment = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(DEVICES)}
    run_warm_python(WITH_XLA, "-m", "benchmarks.tpu_lower", str(folder), *overrides, cwd=CONF.parent, env=environment)
    return (folder / "step.hlo").read_text()


def test_recomputation_takes_its_weights_again_so_that_gathered_ones_need_not_stay(tmp_path: Path) -> None:
    hlo = lowered(tmp_path, "runtime.mode=fsdp", "activation_checkpointing=true", "model.depth=2")
    barriers = [line for line in hlo.splitlines() if " opt-barrier(" in line]
    assert len(barriers) == 2  # before the backward pass of each block
    with torch.device("meta"):
        block = DiT(DiTConfig(32, 4, 2, width=1152, depth=1, num_heads=16, num_classes=1000)).blocks[0]
    shapes = Counter(f"f32[{','.join(map(str, value.shape))}]" for value in block.parameters())
    for barrier in barriers:
        assert shapes <= Counter(re.findall(r"\w+\[[\d,]*\]", barrier.split(" opt-barrier(")[0]))


def annotation(axes: Axes) -> str:
    if not any(axes):
        return "{replicated}"
    return f"{{devices=[{','.join(str(DEVICES) if axis else '1' for axis in axes)}]{EVERY_DEVICE}}}"


def expected_state(num_spread: int) -> Counter[tuple[str, str]]:
    """Return (shape, sharding) of weights, averages and two moments, of which the last ``num_spread`` are sharded."""
    with torch.device("meta"):
        model = DiT(DiTConfig(32, 4, 2, width=1152, depth=28, num_heads=16, num_classes=1000))
    axes = sharding_of(model, DEVICES)
    return Counter(
        (f"f32[{','.join(map(str, value.shape))}]", annotation(axes[name] if copy < num_spread else ()))
        for name, value in model.named_parameters()
        for copy in range(4)
    )


class Graph:
    """The entry computation of an HLO module: the operations that place tensors."""

    def __init__(self, hlo: str) -> None:
        entry = hlo[hlo.index("\nENTRY") :]
        pattern = r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) (\S+?)\((.*?)\)(?:, .*?sharding=(\{.*?\}))?.*$"
        self.operations = {found[1]: found for found in re.finditer(pattern, entry, re.MULTILINE)}
        self.root = re.findall(r"%([\w.-]+)", next(op[4] for op in self.operations.values() if "ROOT" in op[0]))

    def annotated_arguments(self) -> Counter[tuple[str, str]]:
        """Count the placeholders: arguments whose sharding is set by an operation on them."""
        bare = {name for name, op in self.operations.items() if op[3] == "parameter" and op[5] is None}
        users = [op for op in self.operations.values() if op[3] == "custom-call" and op[4].split("%")[-1] in bare]
        assert len(users) == len(bare)
        return Counter((op[2].split("{")[0], op[5]) for op in users)

    def annotated_results(self) -> Counter[tuple[str, str]]:
        results = [self.operations[name] for name in self.root]
        return Counter((op[2].split("{")[0], op[5]) for op in results if op[5] is not None)

    def arguments(self, sharding: str) -> list[str]:
        return [op[2].split("{")[0] for op in self.operations.values() if op[3] == "parameter" and op[5] == sharding]


@pytest.mark.parametrize(("mode", "num_spread"), [("replicated", 0), ("zero1", 3), ("fsdp", 4)])
def test_state_enters_and_leaves_the_step_of_xl_2_spread_by_the_table(
    mode: str, num_spread: int, tmp_path: Path
) -> None:
    graph = Graph(lowered(tmp_path, f"runtime.mode={mode}"))
    state = expected_state(num_spread)
    assert graph.annotated_arguments() == state
    assert state <= graph.annotated_results()
    assert graph.arguments(BATCH) == ["f32[256,4,32,32]"] * 2  # latents and noise
