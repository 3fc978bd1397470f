"""Hooks of the training loop that generate images with the EMA weights."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from core.reading import is_regular
from evaluation.chunks import ChunkStore, TrainingChunks
from evaluation.generate import Generator
from evaluation.grid import save_grid
from runtime.protocol import Metrics, Processes
from train.hooks import due
from train.lines import read_lines
from train.loggers import Logger
from train.runfolder import RunFolder
from train.state import TrainState

EVALUATED_BY_TRAINING = "train"  # the value of "evaluated_by" in a record; the job `evaluate` writes its own name


class _CatchingUpHook:
    """Acts every ``every`` steps and at the end, and once at the start if a killed run missed that."""

    def __init__(self, every: int | None, runtime: Processes) -> None:
        self._every = every
        self._runtime = runtime

    def start(self, state: TrainState) -> None:
        """Act if that was due at the step which this run continues from, unless the main process finds the result."""
        if due(state, self._every):
            done = np.array([self._runtime.is_main and self.is_done(state)])
            if not self._runtime.gather(done).any():
                self.act(state)

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Act when due."""
        if due(state, self._every):
            self.act(state)

    def finish(self) -> None:
        """Do nothing: the action was due at the last step."""

    def is_done(self, state: TrainState) -> bool:
        """Return whether the result of this step is on disk."""
        raise NotImplementedError

    def act(self, state: TrainState) -> None:
        """Produce the result of this step."""
        raise NotImplementedError


class SampleGridHook(_CatchingUpHook):
    """Writes a PNG with ``per_class`` samples of up to 10 classes or prompts, always from the same noise.

    Raises ValueError, before training, where the generator has no conditions to sample.
    """

    def __init__(
        self,
        every: int | None,
        generator: Generator,
        folder: RunFolder,
        logger: Logger,
        per_class: int = 8,
    ) -> None:
        super().__init__(every, generator.runtime)
        self._generator = generator
        self._folder = folder
        self._logger = logger
        self._columns = min(10, generator.conditions.num_groups or generator.spec.num_classes)
        self._count = per_class * self._columns
        self._condition = {} if every is None else generator.conditions.in_turn(self._count, self._columns)

    def is_done(self, state: TrainState) -> bool:
        """Return whether the picture exists."""
        return is_regular(self._folder.grid(state.step))

    def act(self, state: TrainState) -> None:
        """Generate images on all processes, and write the grid on the main one."""
        images = self._generator.all_images(self._condition, self._count, self._count)
        if not self._runtime.is_main:
            return
        path = self._folder.grid(state.step)
        save_grid(path, images, self._columns, self._generator.conditions.texts(self._condition))
        self._logger.log_image("samples", path, state.step)


class EvaluationHook(_CatchingUpHook):
    """Appends a record to evaluations.jsonl.

    ``evaluate`` returns the metrics. ``chunks`` stores a step's finished chunks until its record is written. ``facts``
    returns facts of the model after a number of images seen. ``identity`` distinguishes the hook's records from those
    that other jobs append to the file.
    """

    def __init__(
        self,
        every: int | None,
        evaluate: Callable[[ChunkStore], dict[str, Any]],
        chunks: TrainingChunks,
        facts: Callable[[int], Mapping[str, Any]],
        identity: Mapping[str, Any],
        folder: RunFolder,
        logger: Logger,
        runtime: Processes,
    ) -> None:
        super().__init__(every, runtime)
        self._evaluate = evaluate
        self._chunks = chunks
        self._facts = facts
        self._identity = identity
        self._folder = folder
        self._logger = logger

    def start(self, state: TrainState) -> None:
        """Delete chunks this run will never use, then run a missed evaluation."""
        self._chunks.discard_foreign(state.step)
        super().start(state)

    def require_one_protocol(self) -> None:
        """Raise ValueError where the run's earlier evaluations have another protocol."""
        for record in read_lines(self._folder.evaluations):
            if record.get("evaluated_by") != EVALUATED_BY_TRAINING:
                continue
            for key, now in self._identity.items():
                if record.get(key) != now:
                    raise ValueError(
                        f"The evaluations of {self._folder.path} during training have {key} "
                        f"{json.dumps(record.get(key))}, but now it would be {json.dumps(now)}, and one curve has one "
                        "protocol; give the same settings again, or measure in another way by `ditscale evaluate`."
                    )

    def is_done(self, state: TrainState) -> bool:
        """Return whether the record exists."""
        wanted = {**self._identity, "step": state.step}
        records = read_lines(self._folder.evaluations)
        return any(wanted.items() <= record.items() for record in records)

    def act(self, state: TrainState) -> None:
        """Evaluate on all processes, and write the record on the main one."""
        store = self._chunks.of_step(state.step)
        with store.used():
            metrics = self._evaluate(store)
            record = {"step": state.step, "images_seen": state.images_seen, "evaluated_by": EVALUATED_BY_TRAINING}
            record |= {**self._facts(state.images_seen), **metrics}
            if self._runtime.is_main:
                self._folder.append(self._folder.evaluations, record)
                self._logger.log(record)
            self._runtime.wait()  # until the record is written
        self._chunks.discard_until(state.step)
