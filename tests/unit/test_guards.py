"""Steps whose gradient is an outlier are skipped, and leave a trace only in the log."""

from pathlib import Path

import pytest
import torch
from conftest import json_lines
from test_training import RUNTIME, batch_of, everything, new_state, save, step_of

from train.checkpoint import load_checkpoint
from train.guards import MIN_NORMS, SpikeGuard
from train.hooks import Clock, LogHook
from train.loggers import NoLogger
from train.loop import train
from train.runfolder import RunFolder
from train.state import TrainState


def guarded(state: TrainState, factor: float = 3.0) -> SpikeGuard:
    """Return the guard of a state whose optimizer the runtime has prepared."""
    state.model, state.optimizer = RUNTIME.prepare(state.model, [state.ema.module], state.optimizer)
    return SpikeGuard(factor, state.optimizer, RUNTIME)


def test_an_outlying_step_changes_neither_weights_nor_moments_and_is_counted(tmp_path: Path) -> None:
    state, folder, clock = new_state(), RunFolder(tmp_path), Clock()
    guard = guarded(state)
    state.recent_grad_norms = [1.0] * MIN_NORMS
    step = step_of(state, guard=guard)
    state.total_steps = 3
    hooks = [LogHook(1, folder, NoLogger(), RUNTIME, clock, guard), clock]
    train(state, step, [batch_of(0)], RUNTIME, hooks, 1)
    before = {name: value.clone() for name, value in everything(state).items() if not name.startswith("ema/")}
    state.recent_grad_norms = [1e-3] * MIN_NORMS
    train(state, step, [batch_of(1)], RUNTIME, hooks, 1)
    after = everything(state)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    state.recent_grad_norms = [1.0] * MIN_NORMS
    train(state, step, [batch_of(2)], RUNTIME, hooks, 1)
    assert not torch.equal(everything(state)["final_layer.decoder.bias"], before["final_layer.decoder.bias"])
    lines = json_lines(folder.metrics)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0]
    assert lines[1]["grad_norm"] > 3e-3
    assert lines[1]["update_norm"] == 0 < lines[0]["update_norm"]


def test_the_threshold_is_a_multiple_of_the_median_and_is_restored(tmp_path: Path) -> None:
    state = new_state()
    guard = guarded(state, 5.0)
    for norms in ([1.0] * (MIN_NORMS - 1), [3.0]):
        assert guard.threshold.item() == float("inf")  # too few to judge by
        state.interval = {"grad_norm": norms}
        guard.observe(state)
    assert guard.threshold.item() == 5.0
    save(tmp_path, state)
    other = new_state()
    load_checkpoint(tmp_path / "step_00000000", other)
    restored = guarded(other, 5.0)
    restored.start(other)
    assert restored.threshold.item() == 5.0
    assert other.recent_grad_norms == [*[1.0] * (MIN_NORMS - 1), 3.0]


def test_an_optimizer_that_cannot_skip_and_a_factor_below_the_median_are_refused() -> None:
    state = new_state()
    with pytest.raises(ValueError, match=r"skip_grad_norm is 0.5, but it must exceed 1"):
        guarded(state, 0.5)
    with pytest.raises(ValueError, match="Adagrad cannot skip a step"):
        SpikeGuard(3.0, torch.optim.Adagrad(state.model.parameters(), foreach=False), RUNTIME)
