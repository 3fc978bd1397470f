"""A replay of a diverged run finds the step, sample, module and parameter."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_RUN, InProcess, json_lines, resealed, silent_progress
from poisoned_shards import poisoned
from test_training import RUNTIME, batch_of, everything, new_state, save, step_of
from torch import Tensor, nn

from core.batch import Condition
from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from train.checkpoint import load_checkpoint
from train.guards import MIN_NORMS, SpikeGuard
from train.hooks import Clock, LogHook
from train.loggers import NoLogger
from train.loop import train
from train.replay import FollowHook, Replay
from train.runfolder import RunFolder
from train.state import TrainState

STEP = 15  # the checkpoint before it is of step 10
POSITION = 16 * (STEP - 1) + 5
DUMP = f"run/nonfinite_{STEP:08d}"


@pytest.fixture
def words(digits: Path, tmp_path: Path) -> list[str]:
    """Return the settings of a run that meets an infinite sample."""
    poisoned(digits, tmp_path / "shards", POSITION)
    return ["train", *TINY_RUN, "data.shards=shards", "run_dir=run"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_poisoned_sample_is_named_with_the_module_and_the_parameter_and_nothing_is_written(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    name = poisoned(digits, tmp_path / "shards", POSITION)
    shown = in_process("train", *TINY_RUN, "data.shards=shards", "run_dir=run", expect=1)
    assert f"in step {STEP}, whose batch is the positions 224 to 239" in shown
    assert f"`ditscale train replay={DUMP}` shows what went wrong in that step." in shown
    kept = f"checkpoints/step_{STEP - 5:08d}/model.safetensors"
    assert (tmp_path / DUMP / kept).samefile(tmp_path / "run" / kept)  # a link, which takes no room
    shutil.rmtree(tmp_path / "run/checkpoints")  # as retention does when the run goes on with other settings
    before = files_of(tmp_path)
    shown = in_process("train", f"replay={DUMP}")
    assert f"{DUMP}: step {STEP}, the positions 224 to 239\n" in shown
    assert "samples: 1 of 16 with a loss that is not finite\n" in shown
    image = rf"  position {POSITION}: image {name}, label \d( \(dropped\))?, t \d+, loss nan, largest \|x_0\| inf\n"
    assert re.search(image, shown)
    assert "in the order of the forward pass the first is patch_embedding\n" in shown
    assert "from the loss backwards the first is final_layer.decoder.weight\n" in shown
    assert files_of(tmp_path) == before


def test_weights_that_a_huge_step_blows_up_are_named_where_samples_are_sound(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    """Replay a step before the first checkpoint, whose state follows from the seed."""
    words = ["train", *TINY_RUN, f"data.shards={digits}", "optimizer.lr=1e30"]
    assert "in step 1, whose batch is the positions 0 to 15 (there is no checkpoint yet)" in in_process(
        *words, "run_dir=run", "log_every=1", expect=1
    )
    shown = in_process("train", "replay=run/nonfinite_00000001")
    assert "before the step" not in shown
    assert "samples: no sample alone has a loss or gradient that is not finite (16 looked at)\n" in shown
    assert "outputs of modules: all finite\nnorms of gradients: all finite\n" in shown
    first = "2 not finite; in the order of the model the first is final"
    assert f"norms of weights after the update: {first}" in shown
    assert "in step 2, whose batch" in in_process(*words, "run_dir=later", expect=1)  # no log step, thus no such norm
    shown = in_process("train", "replay=later/nonfinite_00000002")
    assert f"norms of weights before the step: {first}" in shown


def changed(dump: Path, **fields: Any) -> None:
    resealed(dump / "dump.json", **fields)


def test_what_cannot_be_replayed_is_one_sentence(
    digits: Path, words: list[str], tmp_path: Path, in_process: InProcess
) -> None:
    in_process(*words, expect=1)
    again = ["train", f"replay={DUMP}"]
    assert "run is not a dump of a diverged run: it has no dump.json" in in_process("train", "replay=run", expect=2)
    shown = in_process(*again, "optimizer.lr=0.1", "runtime.num_threads=1", expect=2)
    assert f"replay takes its settings from {DUMP}, but optimizer.lr=0.1 is given too; leave it out" in shown
    shown = in_process(*again, f"data.shards={digits}", expect=2)
    assert re.search(r"trained on shards with manifest \w{12}, but .* has \w{12}; give data.shards", shown)
    changed(tmp_path / DUMP, step=STEP - 1)
    shown = in_process(*again, expect=1)
    assert f"step {STEP - 1} is finite this time, but in the run loss was nan" in shown
    changed(tmp_path / DUMP, step=STEP + 1, processes=4)
    shown = in_process(*again, expect=1)
    assert f"loss is nan in step {STEP} already, but in the run" in shown
    assert "processes is 4 there and 1 here; replay where and as the run was trained" in shown
    changed(tmp_path / DUMP, format_version=7)
    assert "has format version 7, but this program reads versions 1 to 2" in in_process(*again, expect=2)
    config = json.loads((tmp_path / DUMP / "dump.json").read_text())["config"]
    changed(tmp_path / DUMP, format_version=2, config={**config, "optimizer": {"_target_": "os.system"}})
    assert f"optimizer._target_ is 'os.system' in {DUMP}/dump.json, which a checkpoint may not ask for" in in_process(
        *again, expect=2
    )
    (tmp_path / DUMP / "dump.json").write_text("{")
    assert "dump.json is damaged" in in_process(*again, expect=2)


def test_a_run_that_wants_no_dump_leaves_none(words: list[str], tmp_path: Path, in_process: InProcess) -> None:
    shown = in_process(*words, "dump_nonfinite=false", expect=1)
    assert f"in step {STEP}, whose batch" in shown
    assert "replay" not in shown
    assert not list((tmp_path / "run").glob("nonfinite*"))


def test_where_a_dump_cannot_be_written_the_run_still_says_why_it_ended(
    words: list[str], in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", fail)
    shown = in_process(*words, expect=1)
    assert f"in step {STEP}, whose batch" in shown
    assert "The dump for replay could not be written: [Errno 28] No space left on device" in shown


def test_replay_skips_the_steps_that_the_run_skipped(tmp_path: Path) -> None:
    """Compare with the bits of the loop and its log, from a checkpoint between two log lines."""

    def prepared(state: TrainState) -> tuple[SpikeGuard, Any]:
        state.model, state.optimizer = RUNTIME.prepare(state.model, [state.ema.module], state.optimizer)
        guard = SpikeGuard(1.001, state.optimizer, RUNTIME)
        return guard, step_of(state, guard=guard)

    whole, folder, clock = new_state(9), RunFolder(tmp_path), Clock()
    whole.recent_grad_norms = [0.59] * MIN_NORMS  # about the median of this run
    guard, step = prepared(whole)
    log = LogHook(2, folder, NoLogger(), RUNTIME, clock, guard)
    train(whole, step, (batch_of(number) for number in range(3)), RUNTIME, [log, clock], 2)
    log.settle(whole)
    save(tmp_path, whole)
    train(whole, step, (batch_of(number) for number in range(3, 9)), RUNTIME, [log, clock], 2)
    skipped = [line["skipped_steps"] for line in json_lines(folder.metrics)]
    assert 0 < sum(skipped[2:]) < 6
    followed = new_state(9)
    load_checkpoint(tmp_path / "step_00000003", followed)
    guard, step = prepared(followed)
    follow = FollowHook(2, 9, RUNTIME, guard, silent_progress)
    train(followed, step, (batch_of(number) for number in range(3, 9)), RUNTIME, [follow], None)
    for name, value in everything(whole).items():
        assert torch.equal(value, everything(followed)[name]), name


class RootOfLabels(nn.Module):
    """A network with a finite loss whose gradient is not finite where a label is 2: a root of zero."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.inner(x_t, t, condition)
        return output + torch.sqrt((condition["label"] != 2) * self.scale).view(-1, 1, 1, 1)


def test_a_sample_whose_gradient_alone_is_not_finite_is_found_among_sound_losses() -> None:
    state = new_state()
    state.model = RootOfLabels(state.model)
    state.optimizer = torch.optim.AdamW(state.model.parameters())
    process = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    replay = Replay(state.model, state, step_of(state), process, RUNTIME)
    passes = replay.passes(batch_of(0))
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    assert passes.gradients == ["scale"]
    found = replay.examine(batch_of(0), batch_of(0), silent_progress)  # of the labels 0, 1, 2 and 10
    assert found.samples == [2]
    assert found.passes.activations == []
    assert list(found.not_finite) == ["grad_norm", "param_norm", "update_norm"]
    assert found.weights == ["scale"]
