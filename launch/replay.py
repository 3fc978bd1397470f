"""``ditscale train replay=RUN/nonfinite_STEP``: report what went wrong in the step at which a run diverged.

The job trains from the checkpoint in the dump up to the step before, then examines that step. It writes no file; the
report goes to standard output.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig

from core.batch import Batch
from core.fields import free_settings
from core.prefetch import prefetch
from core.progress import ProgressBar
from data.conditions import ConditionSource
from data.manifest import Manifest
from data.order import positions_of_step
from data.settings import DataSettings
from data.shards import MappedShards
from launch.builders.build import build_shards
from launch.builders.components import build
from launch.builders.saved_configs import whole_config
from launch.builders.training import PreparedRun, prepare_run
from launch.command.check import check_targets
from launch.command.progress import make_progress
from launch.command.settings import TrainSettings
from launch.command.words import key_of
from runtime.protocol import Processes
from train.checkpoint import code_version, load_newest
from train.dump import FILE_NAME, DivergedError, Dump, read_dump
from train.loop import train
from train.replay import MAX_NAMED, Findings, FollowHook, Replay
from train.stores import FolderStore

# A replay may read the shards from another place or in another way, and use another runtime.
MAY_BE_GIVEN = ("runtime", *free_settings(DataSettings, "data."))


def replay_job(config: TrainSettings) -> None:
    """Report on the last step of the dump ``config.replay``. Exits with 1 where that step is finite in the replay."""
    dump = read_dump(Path(config.replay or ""))
    settings = _settings(dump, config.plain(), list(HydraConfig.get().overrides.task))
    manifest = Manifest.load(settings.data.shards)
    if manifest.hash != dump.data_manifest_hash:
        raise ValueError(
            f"The run of {dump.path} trained on shards with manifest {dump.data_manifest_hash[:12]}, but "
            f"{settings.data.shards} has {manifest.hash[:12]}; give data.shards=FOLDER with the old shards."
        )
    run = prepare_run(settings, manifest)
    runtime, conditions = run.runtime, run.conditions
    shards, progress = build_shards(settings.data), make_progress(settings.name, enabled=runtime.is_main)
    try:
        with runtime.together():
            found, whole = _replayed(dump, run, shards, progress)
        if runtime.is_main:
            positions = positions_of_step(dump.step - 1, settings.batch_size, rank=0, world=1)
            rows = build(settings.data.order)(settings.seed, shards.counts).rows_at(positions)
            samples = _samples(found, whole, conditions, shards, rows.tolist(), positions.tolist())
            print("\n".join(_report(dump, found, samples, positions.tolist())))
    finally:
        shards.close()
    if not found.not_finite:
        raise FloatingPointError(_unlike(dump, f"step {dump.step} is finite this time", settings, runtime))


def _settings(dump: Dump, config: Mapping[str, Any], words: list[str]) -> TrainSettings:
    """Return the dump's config with the settings that the command line may change. Raises ValueError for any other."""
    settings = whole_config(dump.config, str(dump.path / FILE_NAME))
    for word in sorted(words):  # so that `runtime` comes before `runtime.device`
        key = key_of(word)
        if key == "replay":
            continue
        if key not in MAY_BE_GIVEN and not key.startswith("runtime."):
            raise ValueError(
                f"replay takes its settings from {dump.path}, but {word} is given too; leave it out (only "
                f"{', '.join(MAY_BE_GIVEN)} may be given)."
            )
        *path, name = key.split(".")
        into: Any = settings
        value: Any = config
        for part in path:
            into, value = into[part], value[part]
        into[name] = value[name]
    if settings["runtime"].get("compile"):
        settings["runtime"]["compile"] = False  # the replay cannot observe the inside of a compiled block
    check_targets(settings["runtime"], "runtime.")
    return TrainSettings.of(settings)


def _replayed(dump: Dump, run: PreparedRun, shards: MappedShards, progress: ProgressBar) -> tuple[Findings, Batch]:
    """Return the findings on the step, and the batch of all processes."""
    runtime, store = run.runtime, FolderStore(dump.checkpoints)
    state = run.new_state(starts_anew=not store.steps())
    load_newest(store, state)
    begun = run.begin(state)
    mine = run.batches(shards, runtime.data_rank, runtime.data_world)
    follow = FollowHook(run.config.log_every, dump.step - 1, runtime, begun.guard, progress)
    try:
        train(state, begun.step, prefetch(mine.from_step(state.step, dump.step - 1)), runtime, [follow], None)
    except DivergedError as error:
        raise FloatingPointError(_unlike(dump, str(error), run.config, runtime)) from error
    whole = run.batches(shards, rank=0, world=1).batch(dump.step - 1)
    examined = Replay(begun.model, state, begun.step, run.objective, runtime, run.alignment, run.conditions.embedded)
    return examined.examine(mine.batch(dump.step - 1), whole, progress), whole


def _unlike(dump: Dump, what: str, settings: TrainSettings, runtime: Processes) -> str:
    """Return a sentence: the replay differs from the run, and these differences may be the reason."""
    here = {**code_version(), "processes": str(runtime.data_world), "runtime": str(settings.runtime)}
    there = {**dump.code, "processes": str(dump.processes), "runtime": str(_uncompiled(dump.config["runtime"]))}
    differing = [f"{key} is {there.get(key)} there and {here[key]} here" for key in here if there.get(key) != here[key]]
    return (
        f"{what}, but in the run {dump.metric} was {dump.value} in step {dump.step}: "
        f"{'; '.join(differing) or 'the hardware may differ'}; replay where and as the run was trained."
    )


def _uncompiled(runtime: Mapping[str, Any]) -> dict[str, Any]:
    """Return a runtime's settings as `_settings` changes them, where the run itself did not ask for compiled blocks."""
    return {**runtime, "compile": False} if runtime.get("compile") == "auto" else dict(runtime)


def _report(dump: Dump, found: Findings, samples: Iterable[str], positions: list[int]) -> list[str]:
    """Return the findings as lines, among them those on the ``samples``; the step's batch was of ``positions``."""
    metrics = {name: value for name, value in found.metrics.items() if "/" not in name}
    before = found.weights_before  # metrics of the step before may not show it, as norms of weights are of log steps
    return [
        f"{dump.path}: step {dump.step}, the positions {positions[0]} to {positions[-1]}",
        "  " + ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()),
        *([_first("norms of weights before the step", before, "in the order of the model")] if before else []),
        *samples,
        _first("outputs of modules", found.passes.activations, "in the order of the forward pass"),
        _first("norms of gradients", found.passes.gradients, "from the loss backwards"),
        _first("norms of weights after the update", found.weights, "in the order of the model"),
    ]


def _samples(
    found: Findings,
    whole: Batch,
    conditions: ConditionSource,
    shards: MappedShards,
    rows: list[int],
    positions: list[int],
) -> Iterator[str]:
    """Yield lines on the samples at fault: what the step was given of each.

    The batch ``whole`` was read from ``rows`` of the shards, for ``positions``.
    """
    what = "loss" if not np.isfinite(found.passes.losses).all() else "gradient of its own"
    if not found.samples:
        yield f"samples: no sample alone has a loss or gradient that is not finite ({len(rows)} looked at)"
        return
    yield f"samples: {len(found.samples)} of {len(rows)} with a {what} that is not finite"
    names, null = shards.source_ids, conditions.null(whole.condition)
    for index in found.samples[:MAX_NAMED]:
        dropped = null and all(value[index].equal(null[name][index]) for name, value in whole.condition.items())
        label = f"{shards.labels[rows[index]]}{' (dropped)' if dropped else ''}"
        yield (
            f"  position {positions[index]}: image {names[rows[index]]}, label {label}, "
            f"t {whole.t[index]}, loss {found.passes.losses[index]:.6g}, "
            f"largest |x_0| {whole.x_0[index].abs().max():.6g}"
        )
    if len(found.samples) > MAX_NAMED:
        yield f"  and {len(found.samples) - MAX_NAMED} more"


def _first(what: str, names: list[str], order: str) -> str:
    if not names:
        return f"{what}: all finite"
    return f"{what}: {len(names)} not finite; {order} the first is {names[0]}"
