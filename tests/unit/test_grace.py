"""A run takes checkpoints early enough for a preemption, and learns of one from Google Compute Engine."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_RUN, InProcess
from local_server import LocalHandler, LocalServer
from test_training import RUNTIME, batch_of, everything, new_state, step_of

from train.hooks import CheckpointHook, Clock, LogHook
from train.loggers import NoLogger
from train.loop import train
from train.notice import GceNotice
from train.runfolder import RunFolder
from train.signals import EX_TEMPFAIL, StopSignals


class MetadataServer(LocalHandler):
    """Google Compute Engine's metadata server, for one value. It holds an answer back until the value changes."""

    preempted = threading.Event()

    def do_GET(self) -> None:  # noqa: N802 - called by the server
        assert self.headers["Metadata-Flavor"] == "Google"
        path, _, query = self.path.partition("?")
        assert path == "/computeMetadata/v1/instance/preempted"
        if "wait_for_change=true" in query:
            self.preempted.wait(10)
        content = b"TRUE" if self.preempted.is_set() else b"FALSE"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def preempt(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Run a metadata server for this process; return the event that preempts the machine."""
    MetadataServer.preempted = threading.Event()
    with LocalServer(MetadataServer).running() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", server.url.removeprefix("http://"))
        yield MetadataServer.preempted
        MetadataServer.preempted.set()


def checkpoints(folder: RunFolder, every_min: float | None, signals: StopSignals) -> CheckpointHook:
    log = LogHook(10, folder, NoLogger(), RUNTIME, Clock())
    return CheckpointHook(100, 9, folder, {}, RUNTIME, log, signals, agree_every=10, every_min=every_min)


def test_an_old_checkpoint_is_followed_by_another_which_changes_no_bit(tmp_path: Path) -> None:
    states = []
    for name, every_min in (("by steps", None), ("by minutes", 1e-9)):
        state, folder, signals = new_state(), RunFolder(tmp_path / name), StopSignals()
        state.total_steps = 3
        _, state.optimizer = RUNTIME.prepare(state.model, [state.ema.module], state.optimizer)
        train(state, step_of(state), map(batch_of, range(3)), RUNTIME, [checkpoints(folder, every_min, signals)], 10)
        assert folder.store.steps() == ([3] if every_min is None else [1, 2, 3])
        states.append(everything(state))
    one, other = states
    assert all(one[key].equal(other[key]) for key in one)


def test_processes_agree_that_a_checkpoint_is_old() -> None:
    class Two:
        data_world = 2

        def gather(self, rows: np.ndarray) -> np.ndarray:
            return np.concatenate([rows, [[False, True]]])

    assert StopSignals().agreed(Two(), False) == (False, True)  # type: ignore[arg-type]


def test_a_notice_of_preemption_saves_and_stops_the_run(
    digits: Path, tmp_path: Path, in_process: InProcess, preempt: threading.Event
) -> None:
    endless = ["total_steps=1000000", "checkpoint_every=1000000", "train/notice=gce", "run_dir=run"]

    def soon() -> None:
        while not (tmp_path / "run/timing.jsonl").exists():
            time.sleep(0.01)
        preempt.set()

    threading.Thread(target=soon).start()
    shown = in_process("train", *TINY_RUN, *endless, f"data.shards={digits}", expect=EX_TEMPFAIL)
    assert "The machine is preempted." in shown
    assert "SIGTERM: saving, then stopping" in shown
    assert len(RunFolder(tmp_path / "run").store.steps()) == 1


def test_a_machine_without_a_metadata_server_says_so_and_trains(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    with GceNotice().watched():
        until = time.monotonic() + 10
        while "no notice of preemption will come" not in (shown := capfd.readouterr().err):
            assert time.monotonic() < until, shown
            time.sleep(0.01)


def test_a_plan_says_whether_a_checkpoint_fits_the_grace(in_process: InProcess) -> None:
    xl = ["model.width=1152", "model.depth=28", "model.num_heads=16", "model.patch_size=2"]
    assert "note:" not in in_process("plan", *xl)  # 10.8 GB in 30 s at 1 GB/s
    shown = in_process("plan", *xl, "grace_sec=15", "write_gb_per_sec=0.5")
    assert "takes 22 s at 0.5 GB/s, longer than grace_sec=15; set checkpoint_every_min in training" in shown


def test_a_second_signal_of_the_scheduler_does_not_end_a_save() -> None:
    found: list[int] = []
    with StopSignals() as signals, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os._exit", found.append)
        signal.raise_signal(signal.SIGUSR2)  # SLURM's, before a time limit
        assert signals.requested
        signals._since -= 60
        signal.raise_signal(signal.SIGTERM)  # SLURM's, at the limit
        assert found == []
        signal.raise_signal(signal.SIGUSR2)
        assert found == [128 + signal.SIGUSR2]
