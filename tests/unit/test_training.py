"""State, EMA, step, loop, checkpoints and run folders follow their rules."""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import json_lines, resealed
from test_model import tiny
from torch import Tensor

from core.batch import Batch
from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from runtime.accelerate import AccelerateRuntime
from runtime.protocol import AT_LOG_STEPS
from train.checkpoint import load_checkpoint, load_newest
from train.ema import constant
from train.hooks import CheckpointHook, Clock, LogHook
from train.lines import read_lines
from train.loggers import NoLogger
from train.loop import train
from train.runfolder import RunFolder
from train.saving import CheckpointWriter
from train.signals import Stopped, StopSignals
from train.state import TrainState
from train.step import make_step, summary
from train.stores import FolderStore, list_checkpoints

RUNTIME = AccelerateRuntime("fp32", device="cpu")
FACTS = {"seed": 0, "config": {}, "spec": {}, "data_manifest_hash": "0"}


def new_state(total_steps: int = 6) -> TrainState:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    return TrainState(model, constant(model, 0.9), optimizer, batch_size=4, total_steps=total_steps)


def batch_of(step: int, value: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    latent = torch.randn(4, 4, 8, 8, generator=generator) * value
    noise = torch.randn(4, 4, 8, 8, generator=generator)
    return Batch(latent, noise, torch.tensor([1, 100, 500, 999]), {"label": torch.tensor([0, 1, 2, 10])})


def step_of(state: TrainState, **options: Any) -> Any:
    process = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
    return make_step(state.model, state.optimizer, state.ema, process, RUNTIME, **options)


def everything(state: TrainState) -> dict[str, Tensor]:
    optimizer = {f"{i}/{k}": v for i, s in state.optimizer.state_dict()["state"].items() for k, v in s.items()}
    ema = {f"ema/{name}": value for name, value in state.ema.module.state_dict().items()}
    return {**state.model.state_dict(), **ema, **optimizer}


def test_ema_follows_the_weights_after_the_optimizer_step() -> None:
    state = new_state()
    before = state.ema.module.final_layer.decoder.bias.clone()
    step_of(state)([batch_of(0)])
    after = state.model.final_layer.decoder.bias.detach()
    assert not torch.equal(before, after)
    torch.testing.assert_close(state.ema.module.final_layer.decoder.bias, 0.9 * before + 0.1 * after)


def test_a_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema.decay is 1.5"):
        constant(tiny(), 1.5)


def test_gradients_are_clipped_to_the_given_norm_and_cleared() -> None:
    state = new_state()
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in state.model.parameters()])
    metrics = step_of(state, max_grad_norm=0.01)([batch_of(0)])
    after = torch.cat([p.detach().flatten() for p in state.model.parameters()])
    assert metrics["grad_norm"] > 0.01
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_the_loss_falls_on_one_batch() -> None:
    state = new_state()
    step = step_of(state)
    losses = [step([batch_of(0)])["mse"].item() for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


def save(folder: Path, state: TrainState, facts: Mapping[str, Any] = FACTS) -> None:
    writer = CheckpointWriter(FolderStore(folder), RUNTIME)
    writer.save(state, facts)
    writer.wait()


def run_steps(
    state: TrainState,
    folder: RunFolder,
    last: int,
    value: float = 1.0,
    every: int = 2,
    log_every: int = 2,
    keep_every: int | None = None,
    signals: StopSignals | None = None,
) -> None:
    clock = Clock()
    log = LogHook(log_every, folder, NoLogger(), RUNTIME, clock)
    stop = signals or StopSignals()
    hooks = [log, CheckpointHook(every, 2, folder, FACTS, RUNTIME, log, stop, log_every, keep_every), clock]
    batches = (batch_of(step, value) for step in range(state.step, last))
    train(state, step_of(state), batches, RUNTIME, hooks, log_every)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = new_state()
    run_steps(whole, RunFolder(tmp_path / "whole"), 6)
    first = new_state()
    run_steps(first, RunFolder(tmp_path / "parts"), 5)  # one step past the checkpoint of step 4
    second, folder = new_state(), RunFolder(tmp_path / "parts")
    path, complaints = load_newest(folder.store, second)
    assert (second.step, complaints) == (4, [])
    assert path == folder.checkpoints / "step_00000004"
    folder.roll_back(second.step)
    run_steps(second, folder, 6)
    for name, value in everything(whole).items():
        assert torch.equal(value, everything(second)[name]), name
    assert read_lines(folder.metrics) == read_lines(RunFolder(tmp_path / "whole").metrics)


def test_metrics_are_means_over_the_interval(tmp_path: Path) -> None:
    state, folder = new_state(), RunFolder(tmp_path)
    run_steps(state, folder, 6)
    twin = new_state()
    step = step_of(twin)
    losses = [step([batch_of(number)])["loss"].item() for number in range(6)]
    lines = json_lines(folder.metrics)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [line["images_seen"] for line in lines] == [8, 16, 24]
    for number, line in enumerate(lines):
        assert line["loss"] == pytest.approx(sum(losses[2 * number : 2 * number + 2]) / 2, rel=1e-6)


def test_the_log_has_norms_and_the_loss_of_each_quarter_of_t(tmp_path: Path) -> None:
    state, folder = new_state(), RunFolder(tmp_path)
    before = torch.cat([p.detach().flatten() for p in state.model.parameters()])
    run_steps(state, folder, 1, log_every=1, every=1)
    after = torch.cat([p.detach().flatten() for p in state.model.parameters()])
    (line,) = json_lines(folder.metrics)
    assert line["param_norm"] == pytest.approx(after.norm().item(), rel=1e-5)
    assert line["update_norm"] == pytest.approx((after - before).norm().item(), rel=1e-4)
    quarters = [line[f"loss_t_quarter_{number}"] for number in (1, 2, 3, 4)]
    assert quarters[1] is None  # of t = 1, 100, 500 and 999
    assert (2 * quarters[0] + quarters[2] + quarters[3]) / 4 == pytest.approx(line["loss"], rel=1e-5)


def test_the_norm_of_the_update_is_of_the_log_step_and_changes_nothing(tmp_path: Path) -> None:
    """Compare with steps that all have it: the weights are the same, and the norm is the last step's."""
    state, folder = new_state(), RunFolder(tmp_path)
    run_steps(state, folder, 4)
    twin = new_state()
    step = step_of(twin)
    norms = [step([batch_of(number)]) for number in range(4)]
    for name, value in everything(twin).items():
        assert torch.equal(value, everything(state)[name]), name
    for line in json_lines(folder.metrics):
        for name in AT_LOG_STEPS:
            assert line[name] == norms[line["step"] - 1][name].item()
            assert line[name] != norms[line["step"] - 2][name].item()
    assert not AT_LOG_STEPS & step([batch_of(4)], at_log_step=False).keys()


def test_a_run_of_earlier_versions_goes_on_in_the_middle_of_an_interval(tmp_path: Path) -> None:
    """Start with an interval that has norms of each step, as checkpoints had them."""
    state, folder = new_state(), RunFolder(tmp_path)
    step = step_of(state)
    metrics = step([batch_of(0)])
    state.advance()
    state.interval = {name: [value.item()] for name, value in metrics.items()}
    run_steps(state, folder, 2)
    whole = RunFolder(tmp_path / "whole")
    run_steps(new_state(), whole, 2)
    assert json_lines(folder.metrics) == json_lines(whole.metrics)


def test_a_summary_weighs_quarters_by_their_samples_and_adds_up_totals() -> None:
    interval = {"loss": [1.0, 3.0], "q/sum": [6.0, 1.0], "q/count": [3.0, 4.0], "skipped/total": [1.0, 1.0]}
    assert summary(interval) == {"loss": 2.0, "q": 1.0, "skipped": 2.0}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    state, folder = new_state(), RunFolder(tmp_path)
    run_steps(state, folder, 2)
    with pytest.raises(
        FloatingPointError,
        match=r"loss is nan in step 3, whose batch is the positions 8 to 11 \(the last good checkpoint is .*00000002\)",
    ):
        run_steps(state, folder, 6, value=float("nan"))
    assert [path.name for path in list_checkpoints(folder.checkpoints)] == ["step_00000002"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run_steps(new_state(), RunFolder(tmp_path), 6)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000004", "step_00000006"]


def test_checkpoints_of_round_steps_are_kept_for_ever(tmp_path: Path) -> None:
    run_steps(new_state(11), RunFolder(tmp_path), 11, every=1, keep_every=4)
    steps = [path.name[-2:] for path in list_checkpoints(tmp_path / "checkpoints")]
    assert steps == ["04", "08", "10", "11"]


def test_a_run_that_is_asked_to_stop_saves_between_log_lines_and_continues_bit_for_bit(tmp_path: Path) -> None:
    whole, parts = new_state(), RunFolder(tmp_path / "parts")
    run_steps(whole, RunFolder(tmp_path / "whole"), 6, log_every=4)
    for step in range(1, 7):
        state = new_state()
        load_newest(parts.store, state)
        parts.roll_back(state.step)
        with StopSignals() as signals, pytest.raises(Stopped):  # noqa: PT012
            signal.raise_signal(signal.SIGTERM if step % 2 else signal.SIGINT)
            run_steps(state, parts, 6, log_every=4, signals=signals)
        assert state.step == step
    assert parts.metrics.read_text() == RunFolder(tmp_path / "whole").metrics.read_text()
    for name, value in everything(whole).items():
        assert torch.equal(value, everything(state)[name]), name


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path: Path) -> None:
    run_steps(new_state(), RunFolder(tmp_path), 6)
    damaged = tmp_path / "checkpoints/step_00000006/ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    state = new_state()
    path, complaints = load_newest(FolderStore(tmp_path / "checkpoints"), state)
    assert path is not None
    assert (path.name, state.step) == ("step_00000004", 4)
    assert "ema.safetensors should have xxh3_128" in complaints[0]
    (tmp_path / "checkpoints/step_00000004/state.json").write_text("{")
    with pytest.raises(ValueError, match="None of the 2 checkpoints"):
        load_newest(FolderStore(tmp_path / "checkpoints"), new_state())


def test_a_checkpoint_of_a_later_program_is_refused_not_passed_over(tmp_path: Path) -> None:
    run_steps(new_state(), RunFolder(tmp_path), 6)
    newest = tmp_path / "checkpoints/step_00000006/state.json"
    resealed(newest, format_version=7)
    with pytest.raises(ValueError, match="has format version 7, but this program reads versions 1 to 4"):
        load_newest(FolderStore(tmp_path / "checkpoints"), new_state())


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    run_steps(new_state(), RunFolder(tmp_path), 6)
    (tmp_path / "checkpoints/step_00000006/ema.safetensors").chmod(0)
    with pytest.raises(PermissionError):
        load_newest(FolderStore(tmp_path / "checkpoints"), new_state())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run_steps(new_state(), RunFolder(tmp_path), 2)
    model = tiny(depth=1)
    other = TrainState(model, constant(model), torch.optim.AdamW(model.parameters()), 4, 6)
    with pytest.raises(ValueError, match="is of another model than the config"):
        load_checkpoint(tmp_path / "checkpoints/step_00000002", other)


def test_a_run_folder_refuses_another_config_and_names_the_keys(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    config = {"model": {"width": 16, "depth": 2}, "runtime": {"device": "cpu"}, "seed": 0, "total_steps": 6}
    wider = {**config, "model": {"width": 32, "depth": 2}}
    folder.write_config(wider)
    folder.require(config)  # nothing was trained yet: a mistake in the first command is no prison
    folder.write_config(config)
    run_steps(new_state(), folder, 2)
    folder.require({**config, "runtime": {"device": "cuda"}}, free={"runtime"})  # another machine is no other run
    with pytest.raises(ValueError, match=r"model.width is 16 there and 32 now"):
        folder.require(wider)
    with pytest.raises(ValueError, match=r"total_steps is 6 there and 9 now; .*resume.allow"):
        folder.require({**config, "total_steps": 9})
    folder.require({**config, "total_steps": 9}, allowed=["total_steps"])


def test_another_batch_size_is_refused_even_where_it_is_allowed_by_name(tmp_path: Path) -> None:
    """Allow other processes and micro-batches, which are settings of the runtime."""
    folder = RunFolder(tmp_path)
    config = {"batch_size": 4, "runtime": {"micro_batches": 1}}
    folder.write_config(config)
    run_steps(new_state(), folder, 2)
    folder.require({**config, "runtime": {"micro_batches": 2}}, free={"runtime"})
    with pytest.raises(
        ValueError, match=r"batch_size is 4 in the run folder .* and 8 now, but .* keep 4 \(the number of"
    ):
        folder.require({**config, "batch_size": 8}, allowed=["batch_size"])


def test_two_jobs_cannot_train_in_one_folder(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path).locked(),
        pytest.raises(ValueError, match="Another process is training in"),
        RunFolder(tmp_path).locked(),
    ):
        pass
    with RunFolder(tmp_path).locked():
        pass


def test_what_killed_writers_left_aside_is_removed(tmp_path: Path) -> None:
    aside = tmp_path / "checkpoints/.step_00000002.123.tmp"
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_text("half")
    RunFolder(tmp_path).store.clean(newest_good=0)
    assert not aside.exists()


def test_a_run_whose_checkpoints_are_gone_does_not_erase_its_results(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append(folder.metrics, {"step": 8})
    folder.require_no_lost_checkpoint(checkpoint_every=8)  # killed before its first checkpoint
    folder.require_no_lost_checkpoint(checkpoint_every=4)  # killed while that was written beside the steps after it
    with pytest.raises(ValueError, match="results up to step 8 but no checkpoint"):
        folder.require_no_lost_checkpoint(checkpoint_every=3)


def test_rolling_back_drops_later_and_cut_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (2, 4, 6):
        folder.append(folder.metrics, {"step": step})
    with folder.metrics.open("a") as file:
        file.write('{"step": 8, "lo')
    assert [line["step"] for line in read_lines(folder.metrics)] == [2, 4, 6]
    folder.roll_back(4)
    assert folder.metrics.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_a_stranger_reads_the_weights_with_safetensors_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = new_state()
    run_steps(state, RunFolder(tmp_path), 2)
    path = tmp_path / "checkpoints/step_00000002"
    weights = load_file(path / "ema.safetensors")
    assert torch.equal(weights["label_embedding.weight"], state.ema.module.label_embedding.weight)
    assert json.loads((path / "state.json").read_text())["step"] == 2


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*metrics.jsonl is damaged"):
        read_lines(tmp_path / "metrics.jsonl")


def test_step_time_leaves_out_what_other_hooks_do(tmp_path: Path) -> None:
    class Sleepy(Clock):
        def __call__(self, state: TrainState, metrics: Any) -> None:
            if state.step % 2 == 0:
                time.sleep(0.5)

    state, folder, clock = new_state(), RunFolder(tmp_path), Clock()
    hooks = [LogHook(2, folder, NoLogger(), RUNTIME, clock), Sleepy(), clock]
    train(state, step_of(state), (batch_of(step) for step in range(6)), RUNTIME, hooks, 2)
    assert all(line["step_time_sec"] < 0.25 for line in json_lines(folder.timing))


def test_hooks_are_finished_after_an_exception(tmp_path: Path) -> None:
    finished = []

    class Watcher(Clock):
        def finish(self) -> None:
            finished.append(True)

    def broken() -> Iterator[Batch]:
        yield batch_of(0)
        raise OSError("disk gone")

    state = new_state()
    with pytest.raises(OSError, match="disk gone"):
        train(state, step_of(state), broken(), RUNTIME, [Watcher()], None)
    assert finished == [True]
