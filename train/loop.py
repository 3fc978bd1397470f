"""The training loop."""

from collections.abc import Iterable, Sequence

from core.batch import Batch
from runtime.protocol import Runtime, Step
from train.hooks import Hook, due_next
from train.state import TrainState


def train(
    state: TrainState,
    step: Step,
    host_batches: Iterable[Batch],
    runtime: Runtime,
    hooks: Sequence[Hook],
    log_every: int | None,
) -> None:
    """Run every batch through the step; hooks do everything that is not training, and log every ``log_every`` steps.

    Hooks start before the first batch, even in a run that has no steps left: a run that was killed between its last
    step and its last hook then catches up.
    """
    try:
        for hook in hooks:
            hook.start(state)
        for micro_batches in runtime.feed(host_batches):
            metrics = step(micro_batches, at_log_step=due_next(state, log_every))
            state.advance()
            for hook in hooks:
                hook(state, metrics)
    finally:
        for hook in hooks:
            hook.finish()
