"""Hooks that run around the training steps: logging, progress, checkpoints."""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Protocol

from core.progress import ProgressBar
from runtime.protocol import AT_LOG_STEPS, Metrics, Runtime
from train.dump import DivergedError
from train.guards import SpikeGuard
from train.loggers import Logger
from train.runfolder import RunFolder
from train.saving import CheckpointWriter
from train.signals import Stopped, StopSignals
from train.state import TrainState
from train.step import summary


class Hook(Protocol):
    """Runs around every step, on every process, in the order of the list of hooks."""

    def start(self, state: TrainState) -> None:
        """Run before the first step of this process; ``state.step`` steps of the run are done."""
        ...

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Run after each step; metrics are scalars on the device."""
        ...

    def finish(self) -> None:
        """Run after the last step, or after an exception."""
        ...


def due(state: TrainState, every: int | None) -> bool:
    """Return whether an action of every ``every`` steps, and of the last step, is due now. None is never."""
    return every is not None and state.step > 0 and (state.step % every == 0 or state.finished)


def due_next(state: TrainState, every: int | None) -> bool:
    """Return whether that action will be due after the next step."""
    return every is not None and ((state.step + 1) % every == 0 or state.step + 1 >= state.total_steps)


class ProgressHook:
    """A progress bar with steps per second, ETA and loss."""

    def __init__(self, progress: ProgressBar, log: "LogHook") -> None:
        self._progress, self._log = progress, log
        self._bar: Any = None
        self._stack = ExitStack()

    def start(self, state: TrainState) -> None:
        """Show a bar at the current step."""
        bar = self._progress("train", state.step, state.total_steps, "step")
        self._bar = self._stack.enter_context(bar)

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Advance the bar by one step and show the loss of the last log line."""
        if self._log.last_loss is not None:
            self._bar.note(f"loss {self._log.last_loss:.4f}")
        self._bar.update(1)

    def finish(self) -> None:
        """Close the bar."""
        self._stack.close()


class Clock:
    """Measures the time between log steps without the time of other hooks there; it must be the last hook."""

    def __init__(self) -> None:
        self._since = 0.0
        self._read = False

    def start(self, state: TrainState) -> None:
        """Start, after the other hooks have started."""
        self._since = time.perf_counter()

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Restart if the time was read at this step."""
        if self._read:
            self._since, self._read = time.perf_counter(), False

    def read(self) -> float:
        """Return the seconds since the last start; the next interval begins after all hooks of this step."""
        self._read = True
        return time.perf_counter() - self._since

    def finish(self) -> None:
        """Do nothing."""


class LogHook:
    """Writes means over the last ``every`` steps as one line of metrics.jsonl and to the logger.

    Norms of the weights and of the update are those of the last step (`AT_LOG_STEPS`).
    ``metrics.jsonl`` holds only values that the config determines; times go to ``timing.jsonl``. Raises
    DivergedError at the first value that is not finite, so that no later checkpoint is written.
    """

    def __init__(
        self,
        every: int,
        folder: RunFolder,
        logger: Logger,
        runtime: Runtime,
        clock: Clock,
        guard: SpikeGuard | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self._every = every
        self._max_grad_norm = max_grad_norm  # for advice alone
        self._folder = folder
        self._logger = logger
        self._runtime = runtime
        self._clock = clock
        self._guard = guard
        self._history: list[Metrics] = []  # on the device
        self._steps_timed = 0
        self._further_timing: dict[str, float] = {}
        self.last_loss: float | None = None  # mean over the last interval

    def start(self, state: TrainState) -> None:
        """Start the guard; the state already has what a stopped run measured since its last line."""
        if self._guard is not None:
            self._guard.start(state)

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Store the step's metrics on the device; read them at log steps only."""
        is_due = due(state, self._every)
        self._history.append({key: value for key, value in metrics.items() if is_due or key not in AT_LOG_STEPS})
        self._steps_timed += 1
        if is_due:
            self._log(state)

    def settle(self, state: TrainState) -> None:
        """Move metrics from the device to ``state.interval``. Every process must call it."""
        if self._history:
            for name, values in self._runtime.fetch(self._history).items():
                state.interval.setdefault(name, []).extend(values)
            self._history = []
            self._require_finite(state)

    def note_timing(self, seconds: Mapping[str, float]) -> None:
        """Add durations to the next line of ``timing.jsonl``."""
        self._further_timing |= seconds

    def _log(self, state: TrainState) -> None:
        self.settle(state)
        step_time_sec = self._clock.read() / self._steps_timed
        means = summary(state.interval)
        self.last_loss = means.get("loss")
        if self._guard is not None:
            self._guard.observe(state)
        state.interval, self._steps_timed = {}, 0
        progress = {"step": state.step, "images_seen": state.images_seen}
        timing = {"step_time_sec": step_time_sec, "images_per_sec": state.batch_size / step_time_sec}
        timing |= self._further_timing
        self._further_timing = {}
        if self._runtime.is_main:
            self._folder.append(self._folder.metrics, {**progress, **means})
            self._folder.append(self._folder.timing, {**progress, **timing})
            self._logger.log({**progress, **means, **timing})

    def _require_finite(self, state: TrainState) -> None:
        number_of_steps = len(next(iter(state.interval.values())))
        for number in range(-number_of_steps, 0):
            for name, values in state.interval.items():
                if len(values) + number >= 0 and not math.isfinite(values[number]):
                    raise self._diverged(name, values[number], state.step + number + 1, state.batch_size)

    def _diverged(self, name: str, value: float, step: int, batch_size: int) -> DivergedError:
        steps = self._folder.store.steps()
        kept = (
            f"the last good checkpoint is {self._folder.store.place(steps[-1])}"
            if steps
            else "there is no checkpoint yet"
        )
        clip = "set max_grad_norm"
        if self._max_grad_norm is not None:
            clip = f"set a max_grad_norm below {self._max_grad_norm:g}"
        sentence = (
            f"{name} is {value} in step {step}, whose batch is the positions {(step - 1) * batch_size} to "
            f"{step * batch_size - 1} ({kept}); the same command would diverge again: lower optimizer.lr or "
            f"{clip}."
        )
        return DivergedError(sentence, step, name, value)

    def finish(self) -> None:
        """Do nothing: the last step is always logged."""


class CheckpointHook:
    """Saves the state every ``every`` steps, at the end, and when the run is asked to stop, which ends the run.

    With ``every_min`` it also saves once the last save is so many minutes old, which changes no bit of the run. A
    single process saves and stops after any step; several agree at log steps, ``agree_every`` steps apart. Files are
    written asynchronously. The newest ``keep`` checkpoints are kept, and those whose step is a multiple of
    ``keep_every``.
    """

    def __init__(
        self,
        every: int,
        keep: int,
        folder: RunFolder,
        facts: Mapping[str, Any],
        runtime: Runtime,
        log: LogHook,
        signals: StopSignals,
        agree_every: int,
        keep_every: int | None = None,
        every_min: float | None = None,
    ) -> None:
        self._every = every
        self._every_sec = math.inf if every_min is None else 60 * every_min
        self._folder = folder
        self._facts = facts
        self._writer = CheckpointWriter(
            folder.store, runtime, folder.publish, lambda: folder.retain_checkpoints(keep, keep_every)
        )
        self._runtime = runtime
        self._log = log
        self._signals = signals
        self._agree_every = agree_every if runtime.data_world > 1 else 1
        self._saved_at, self._saved_sec = 0, 0.0

    def start(self, state: TrainState) -> None:
        """Remember the restored step, which is already saved."""
        self._saved_at, self._saved_sec = state.step, time.monotonic()

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Save when due. Raises `Stopped` if the run was asked to stop, and any error of the last save."""
        self._writer.check()
        self._folder.check()
        stops = is_old = False
        if due(state, self._agree_every):
            stops, is_old = self._signals.agreed(self._runtime, time.monotonic() - self._saved_sec >= self._every_sec)
        if stops or is_old or due(state, self._every):
            self.save(state)
        if stops:
            self._writer.wait()
            raise Stopped

    def stop_if_asked(self, state: TrainState) -> None:
        """Save and raise `Stopped` if the run was asked to stop; only for a single process, between two steps."""
        if self._runtime.data_world == 1 and self._signals.requested:
            self.save(state)
            self._writer.wait()
            raise Stopped

    def save(self, state: TrainState) -> None:
        """Start saving, unless this step is already saved. Every process must call it."""
        if state.step == self._saved_at:
            return
        self._log.settle(state)
        self._writer.save(state, self._facts, self._folder.lines_so_far() if self._runtime.is_main else None)
        self._log.note_timing({"checkpoint_stall_sec": self._writer.timing.stall_sec})
        self._saved_at, self._saved_sec = state.step, time.monotonic()

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk."""
        self._writer.wait()
