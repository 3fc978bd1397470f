"""Training on a GPU gives the CPU's run, repeats it bit for bit, never waits, and saves the exact state."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_RUN, command, run_process
from on_device import DEVICE, distance, make_runtime, no_waiting
from safetensors.torch import load_file
from small_text_encoders import write_small_clip, write_small_t5
from test_training import FACTS, everything, new_state
from tiny_run import Case, diffusion, plain, under_runtime
from torch import Tensor

from model.network import checkpoint_units
from train.checkpoint import load_checkpoint
from train.guards import SpikeGuard
from train.saving import CheckpointWriter
from train.step import make_step
from train.stores import FolderStore

BLOCKS = ["AdaLNZeroBlock", "AdaLNBlock", "CrossAttentionBlock", "InContextBlock"]
FLOAT32 = 1e-4  # relative: losses, and the norm of each tensor's difference after 20 steps
BFLOAT16 = 1e-2  # relative, of losses


def case(**fields: Any) -> Case:
    """Return a case on the device, with exact float32."""
    settings = {"device": DEVICE.type, "tf32": False, "cuda_graph": False, **fields.pop("settings", {})}
    return Case(fields.pop("name", "gpu"), "accelerate", settings=settings, **fields)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    # Softmax does not see the bias of a key's norm: its gradient is rounding and nothing else.
    compared = [name for name in expected if not (name.startswith("optimizer/") and "norm_key.bias/exp_avg" in name)]
    far = {name: distance(found[name], expected[name]) for name in compared}
    assert max(far.values()) < FLOAT32, max(far, key=far.__getitem__)


def assert_same_run(run: Case) -> None:
    """Check that losses, norms and state are those of eager PyTorch on the CPU."""
    (expected, of_plain), (found, facts) = plain(run), under_runtime(run)
    assert facts["losses"] == pytest.approx(of_plain["losses"], rel=FLOAT32)
    assert facts["skipped"] == of_plain["skipped"]
    for norm, values in of_plain["norms"].items():
        assert facts["norms"][norm] == pytest.approx(values, rel=FLOAT32), norm
    assert_close(found, expected)


@pytest.mark.parametrize("block", BLOCKS)
def test_twenty_steps_in_float32_are_those_of_the_cpu(block: str) -> None:
    settings = {"micro_batches": 2} if block == "AdaLNBlock" else {}
    recomputes = block == "CrossAttentionBlock"
    qk_norm = block == "InContextBlock"
    assert_same_run(case(block=block, qk_norm=qk_norm, activation_checkpointing=recomputes, settings=settings))


@pytest.mark.parametrize(
    "fields",
    [{"skip_over": [0.835] * 6 + [0.715] * 14}, {"max_grad_norm": 0.5}, {"average": "power"}],
    ids=["skipping", "clipped", "power"],
)
def test_recipes_are_those_of_the_cpu(fields: dict[str, Any]) -> None:
    assert_same_run(case(**fields))


@pytest.fixture
def text_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write small text encoders where cases with captions look for them."""
    monkeypatch.chdir(tmp_path)
    write_small_clip(tmp_path / "clip")
    write_small_t5(tmp_path / "t5")


@pytest.mark.parametrize(("block", "text"), [("InContextBlock", "clip"), ("CrossAttentionBlock", "t5")])
def test_captions_are_encoded_in_the_step_as_on_the_cpu(text_encoders: None, block: str, text: str) -> None:
    assert_same_run(case(block=block, text=text))


def test_bfloat16_is_of_the_network_alone() -> None:
    run = case(precision="bf16")
    (_, of_plain), (found, facts) = plain(run), under_runtime(run)
    assert facts["losses"] == pytest.approx(of_plain["losses"], rel=BFLOAT16)
    assert facts["losses"] != pytest.approx(of_plain["losses"], rel=1e-6)
    assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
def test_a_deterministic_run_has_the_same_bits_again(recomputes: bool) -> None:
    run = case(precision="bf16", activation_checkpointing=recomputes, settings={"deterministic": True})
    (one, facts), (other, again) = under_runtime(run), under_runtime(run)
    assert facts["losses"] == again["losses"]
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("recomputes", "how"), [(False, True), (True, True), (False, "whole")])
def test_a_compiled_run_is_the_eager_one(precision: str, recomputes: bool, how: bool | str) -> None:
    fields = {"precision": precision, "activation_checkpointing": recomputes, "steps": 5}
    (eager, of_eager), (compiled, facts) = (
        under_runtime(case(**fields, settings={"compile": compile_})) for compile_ in (False, how)
    )
    assert facts["of_training"] == {"compilations": 1, "graph_breaks": 0}  # of two blocks
    assert facts["losses"] == pytest.approx(of_eager["losses"], rel=FLOAT32 if precision == "fp32" else BFLOAT16)
    if precision == "fp32":
        assert_close(compiled, eager)


GRAPHED: dict[str, dict[str, Any]] = {
    "plain": {},
    "skipping": {"skip_over": [0.835] * 6 + [0.715] * 14},
    "clipped": {"max_grad_norm": 0.5, "average": "power"},
    "recomputed": {"activation_checkpointing": True, "settings": {"micro_batches": 2}},
    "compiled": {"settings": {"compile": True}},
    "captions": {"block": "InContextBlock", "text": "clip"},
}


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", GRAPHED)
def test_a_run_replayed_as_cuda_graphs_has_the_bits_of_the_eager_one(
    text_encoders: None, name: str, precision: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = {**GRAPHED[name], "precision": precision}
    settings = {"deterministic": True, **fields.pop("settings", {})}
    (eager, of_eager), (graphed, facts) = (
        under_runtime(case(**fields, settings={**settings, "cuda_graph": graph})) for graph in (False, True)
    )
    assert "CUDA graph" not in capfd.readouterr().err  # nothing fell back
    assert (facts["losses"], facts["norms"], facts["skipped"]) == tuple(
        of_eager[key] for key in ("losses", "norms", "skipped")
    )
    for key, value in eager.items():
        assert torch.equal(graphed[key], value), key


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_step_that_cannot_be_captured_is_executed_eagerly(capfd: pytest.CaptureFixture[str]) -> None:
    run, runtime = Case("x", "accelerate", steps=6), make_runtime(cuda_graph=True)
    model = run.model()
    averages, optimizer = run.averages(model), run.optimizer(model)
    stepping, optimizer = runtime.prepare(model, list(averages.modules.values()), optimizer)
    plain_step = make_step(stepping, optimizer, averages, runtime.place(diffusion()), runtime)

    def reading(*arguments: Any) -> Any:
        metrics = plain_step(*arguments)
        metrics["loss"].item()  # makes the host wait, which no capture allows
        return metrics

    step = runtime.step(reading)
    losses = runtime.fetch([step(micro_batches) for micro_batches in runtime.feed(run.batches(0, 1))])["loss"]
    _, of_plain = plain(run)
    assert losses == pytest.approx(of_plain["losses"], rel=FLOAT32)
    assert capfd.readouterr().err.count("not replayed as a CUDA graph") == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("block", BLOCKS)
def test_no_step_makes_the_host_wait(block: str, precision: str) -> None:
    run, runtime = Case("x", "accelerate", block=block, steps=6), make_runtime(precision, micro_batches=2)
    model = run.model()
    averages, optimizer = run.averages(model), run.optimizer(model)
    checkpoint_units(model, runtime.checkpoint)
    process = runtime.place(diffusion())
    stepping, optimizer = runtime.prepare(model, list(averages.modules.values()), optimizer)
    guard = SpikeGuard(2.0, optimizer, runtime)
    step = runtime.step(make_step(stepping, optimizer, averages, process, runtime, 1.0, guard))
    batches = runtime.feed(run.batches(0, 1))
    history = [step(next(batches)), step(next(batches))]  # libraries are loaded, memory is taken
    with no_waiting():
        history += [step(micro_batches) for micro_batches in batches]
    assert len(runtime.fetch(history)["loss"]) == 6


def test_a_checkpoint_written_beside_training_holds_the_bits_of_its_step(tmp_path: Path) -> None:
    run, runtime = Case("x", "accelerate", steps=12), make_runtime()
    state = new_state()
    _, state.optimizer = runtime.prepare(state.model, [state.ema.module], state.optimizer)
    step = make_step(state.model, state.optimizer, state.ema, runtime.place(diffusion()), runtime)
    writer, taken = CheckpointWriter(FolderStore(tmp_path), runtime), {}
    for micro_batches in runtime.feed(run.batches(0, 1)):
        step(micro_batches)
        state.advance()
        if state.step in (4, 8):
            writer.save(state, FACTS)  # steps go on while it is written; the second save uses the first one's memory
            taken[state.step] = {name: value.cpu().clone() for name, value in everything(state).items()}
    writer.wait()
    for number, expected in taken.items():
        restored = new_state()
        load_checkpoint(tmp_path / f"step_{number:08d}", restored)
        for name, value in everything(restored).items():
            assert torch.equal(value, expected[name]), (number, name)


def test_a_run_killed_and_continued_ends_with_the_same_bits(digits: Path, tmp_path: Path) -> None:
    often = ["total_steps=400", "checkpoint_every=10", "log_every=10", "precision=bf16"]
    on_device = ["runtime=accelerate", f"runtime.device={DEVICE.type}", "runtime.deterministic=true"]
    words = command("train", *TINY_RUN, f"data.shards={digits}", *often, *on_device)
    run_process([*words, "run_dir=whole"], tmp_path, expect=0)
    process = subprocess.Popen([*words, "run_dir=killed"], cwd=tmp_path)
    until = time.monotonic() + 300
    while not (tmp_path / "killed/checkpoints/step_00000020").is_dir():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run_process([*words, "run_dir=killed"], tmp_path, expect=0)
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = (load_file(tmp_path / run / "checkpoints/step_00000400" / file) for run in ("whole", "killed"))
        for name, value in one.items():
            assert torch.equal(value, other[name]), (file, name)


ALONE: list[dict[str, Any]] = [
    {"name": "replicated"},
    {"name": "wrapped", "wrapped": True},  # in DistributedDataParallel, as if there were others
    {"name": "fsdp", "settings": {"mode": "fsdp"}},
    {"name": "fsdp-recomputed", "settings": {"mode": "fsdp", "micro_batches": 2}, "activation_checkpointing": True},
]


def test_a_process_alone_with_nccl_trains_the_same_run_in_all_modes(tmp_path: Path) -> None:
    cases = [asdict(case(**fields)) for fields in ALONE]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    script = Path(__file__).parent.parent / "runtime/tiny_run.py"
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    run_process([*launcher, str(script), str(tmp_path), json.dumps(cases)], tmp_path, expect=0, env=env)
    expected, of_plain = plain(Case("plain", "plain"))
    for fields in ALONE:
        facts = json.loads((tmp_path / f"{fields['name']}.json").read_text())
        assert facts["losses"] == pytest.approx(of_plain["losses"], rel=FLOAT32)
        assert_close(load_file(tmp_path / f"{fields['name']}.safetensors"), expected)
