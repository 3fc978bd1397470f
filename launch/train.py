"""``ditscale train``: train a model on shards into a run folder. The same command continues a stopped run."""

import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig

from core.fields import free_settings
from core.prefetch import prefetch
from core.progress import ProgressBar
from core.urls import redacted_config
from data.manifest import LatentSpec, Manifest
from evaluation.chunks import ChunkStore, TrainingChunks, discard_training
from evaluation.evaluate import distance_records
from evaluation.generate import Generator
from evaluation.hooks import EvaluationHook, SampleGridHook
from launch.builders.build import (
    CHUNKS,
    build_evaluator,
    build_generator,
    build_shards,
    model_facts,
)
from launch.builders.components import build
from launch.builders.data_settings import settle_by_shards
from launch.builders.facts import facts_of_process
from launch.builders.saved_configs import as_now
from launch.builders.training import prepare_run
from launch.command.logger_settings import settle_logger
from launch.command.settings import TrainSettings
from launch.jobs import start
from launch.replay import replay_job
from model.network import Network
from runtime.protocol import Processes, Runtime
from train.checkpoint import code_version, load_newest, read_lines_copy, read_state_file
from train.dump import DivergedError, write_dump
from train.ema import MAIN, initial_share_note
from train.guards import SpikeGuard
from train.hooks import CheckpointHook, Clock, Hook, LogHook, ProgressHook
from train.lines import read_lines
from train.loggers import Logger, NoLogger
from train.loop import train
from train.mirror import MirroredRunFolder
from train.notice import Notice
from train.runfolder import RunFolder
from train.signals import EX_TEMPFAIL, Stopped, StopSignals, watched
from train.standing import recorded
from train.state import TrainState


def train_job(config: TrainSettings, progress: ProgressBar) -> None:
    """Train, or continue to train, the run in ``run_dir``. Settings that do not fit are refused before any write.

    With ``replay``, examine the last step of a diverged run instead.
    """
    if config.replay is not None:
        return replay_job(config)
    run = prepare_run(config, Manifest.load(config.data.shards))
    config, manifest, runtime = run.config, run.manifest, run.runtime
    folder = _run_folder(config)
    state = run.new_state(starts_anew=not folder.store.steps())
    generator = build_generator(
        config,
        state.ema.module,
        run.objective,
        run.autoencoder,
        run.spec,
        run.conditions,
        config.evaluation.seed,
        runtime,
        config.class_dropout,
    )
    shards = build_shards(config.data)
    batches = run.batches(shards, runtime.data_rank, runtime.data_world)
    notice: Notice = build(config.notice)
    stopped = False
    with runtime.together(), folder.locked() if runtime.is_main else nullcontext(), StopSignals() as signals:
        kept = redacted_config(config.plain())  # secrets must not reach any file of the run
        _require_this_run(folder, kept, config.resume.allow, runtime)
        _restore(folder, state, manifest, config.checkpoint_every, runtime)
        logger = _logger(config, folder, runtime)
        with recorded(folder.path, state, runtime.is_main), notice.watched():
            try:
                begun = run.begin(state)
                hooks = _hooks(
                    config, state, runtime, generator, manifest, folder, logger, progress, signals, begun.guard
                )
                if runtime.is_main:
                    folder.write_config(kept)  # after every check that may refuse the run
                    _tell(folder, state, config, logger, runtime)
                evaluated = len(read_lines(folder.evaluations))
                host_batches = prefetch(batches.from_step(state.step, config.total_steps))
                train(state, begun.step, host_batches, runtime, hooks, config.log_every)
            except Stopped:
                stopped = True
            except DivergedError as error:
                _keep_diverged(error, folder, config, _facts(config, run.spec, manifest), runtime)
            finally:
                shards.close()
                logger.finish()
        if runtime.is_main:
            folder.publish()
    if stopped:
        _leave_for_requeue(folder, state, runtime)
    if runtime.is_main:
        if len(read_lines(folder.evaluations)) > evaluated:  # or one that a killed run missed
            from launch.report import update_group  # imported late: its plotting library takes two seconds

            update_group(Path(config.sweep_dir), config.group, config.logger)
        print(_summary(folder, state))


def _run_folder(config: TrainSettings) -> RunFolder:
    path = Path(config.run_dir)
    return RunFolder(path) if config.remote_dir is None else MirroredRunFolder(path, config.remote_dir)


def _leave_for_requeue(folder: RunFolder, state: TrainState, runtime: Processes) -> NoReturn:
    """Exit with the code that asks the scheduler to requeue the job."""
    if runtime.is_main:
        print(f"{folder.path}: stopped and saved at step {state.step}; the same command continues.", file=sys.stderr)
    sys.exit(EX_TEMPFAIL)


def _require_this_run(folder: RunFolder, config: Mapping[str, Any], allowed: Iterable[str], runtime: Processes) -> None:
    """Check in the main process that the folder belongs to this run or to none. Raises ValueError where it does not."""
    if runtime.is_main:
        folder.require(config, free_settings(TrainSettings), allowed, as_now)
    runtime.wait()


def _restore(
    folder: RunFolder, state: TrainState, manifest: Manifest, checkpoint_every: int, runtime: Processes
) -> None:
    """Restore the newest good checkpoint, and roll back what was written after it."""
    path, complaints = load_newest(folder.store, state)
    if path is None:
        folder.require_no_lost_checkpoint(checkpoint_every)
    else:
        trained_on = read_state_file(path)["data_manifest_hash"]
        if trained_on != manifest.hash:
            raise ValueError(
                f"The run {folder.path} was trained on shards with manifest {trained_on[:12]}, but data.shards has "
                f"{manifest.hash[:12]}; point data.shards to the old shards or start a new run."
            )
    if runtime.is_main:
        for complaint in complaints:
            print(f"warning: {complaint} Continuing from step {state.step}.", file=sys.stderr)
    runtime.wait()  # every process must have read the lines before the main one rolls some back
    if runtime.is_main:
        folder.store.clean(state.step)
        names = (folder.metrics.name, folder.evaluations.name)
        copies = {} if path is None else {name: read_lines_copy(path, name) for name in names}
        for note in folder.roll_back(state.step, copies):
            print(f"warning: {note}", file=sys.stderr)
    runtime.wait()


def _logger(config: TrainSettings, folder: RunFolder, runtime: Processes) -> Logger:
    if not runtime.is_main:
        return NoLogger()
    logger: Logger = build(config.logger)(
        folder=folder.path, group=config.group, name=config.name, config=config.plain(), job="train"
    )
    return logger


def _facts(config: TrainSettings, spec: LatentSpec, manifest: Manifest) -> dict[str, Any]:
    """Return what identifies the run in its checkpoints and in a dump."""
    return {
        "seed": config.seed,
        "config": redacted_config(config.plain()),
        "spec": asdict(spec),
        "data_manifest_hash": manifest.hash,
        "class_names": manifest.class_names,
        "code": code_version(),
    }


def _keep_diverged(
    error: DivergedError, folder: RunFolder, config: TrainSettings, facts: Mapping[str, Any], runtime: Processes
) -> NoReturn:
    """Write a dump for replay where the config asks for it, then raise the error again."""
    if not config.dump_nonfinite:
        raise error
    path = folder.dump(error.step)
    remark = f"`ditscale train replay={path}` shows what went wrong in that step."
    if runtime.is_main:
        try:
            write_dump(path, folder.store, error, facts, runtime.data_world)
        except (OSError, ValueError) as failure:  # must not hide why the run ended
            remark = f"The dump for replay could not be written: {failure}."
    runtime.wait()
    raise FloatingPointError(f"{error} {remark}") from error


def _hooks(
    config: TrainSettings,
    state: TrainState,
    runtime: Runtime,
    generator: Generator,
    manifest: Manifest,
    folder: RunFolder,
    logger: Logger,
    progress: ProgressBar,
    signals: StopSignals,
    guard: SpikeGuard | None,
) -> list[Hook]:
    """Return the hooks. An evaluation's extractor and reference are made here, before training starts."""
    clock = Clock()
    facts = _facts(config, generator.spec, manifest)
    log = LogHook(config.log_every, folder, logger, runtime, clock, guard, config.max_grad_norm)
    checkpoints = CheckpointHook(
        config.checkpoint_every,
        config.keep_checkpoints,
        folder,
        facts,
        runtime,
        log,
        signals,
        agree_every=config.log_every,
        keep_every=config.keep_checkpoint_every,
        every_min=config.checkpoint_every_min,
    )
    hooks: list[Hook] = [
        ProgressHook(progress, log),
        log,
        checkpoints,
        SampleGridHook(config.sample_every, generator, folder, logger),
    ]
    if config.evaluate_every is None:
        discard_training(folder.path / CHUNKS)
    else:
        watched_progress = watched(progress, lambda: checkpoints.stop_if_asked(state))
        hooks.append(_evaluation_hook(config, state.model, generator, manifest, folder, logger, watched_progress))
    return [*hooks, clock]


def _evaluation_hook(
    config: TrainSettings,
    model: Network,
    generator: Generator,
    manifest: Manifest,
    folder: RunFolder,
    logger: Logger,
    progress: ProgressBar,
) -> EvaluationHook:
    evaluator = build_evaluator(config, generator.runtime, progress, generator.conditions)
    evaluator.require(generator.spec.image_size, generator.spec.num_classes)

    # Settings, source code and data determine the weights of a step, so equal ones make a killed run's chunks usable.
    origin = {**facts_of_process(config.plain()), "manifest": manifest.hash, "protocol": asdict(evaluator.protocol)}
    chunks = TrainingChunks(folder.path / CHUNKS, {**origin, "feature_extractor": evaluator.features_hash})

    def measure(store: ChunkStore) -> dict[str, Any]:
        return evaluator.evaluate(generator, progress, store)

    def facts(images_seen: int) -> dict[str, Any]:
        return model_facts(model, generator.objective, images_seen, "ema", config.seed)

    identity = {"weights": "ema", **evaluator.identity}
    hook = EvaluationHook(config.evaluate_every, measure, chunks, facts, identity, folder, logger, generator.runtime)
    hook.require_one_protocol()
    return hook


def _tell(folder: RunFolder, state: TrainState, config: TrainSettings, logger: Logger, runtime: Processes) -> None:
    """Print on stderr what is about to be trained, with notes on settings that the user may not want."""
    if state.finished:
        return
    begins = f"continues from step {state.step}" if state.step else "starts"
    processes = f", {runtime.data_world} processes" if runtime.data_world > 1 else ""
    lines = [
        f"{folder.path}: {begins}, to step {state.total_steps}, on {runtime.device}{processes}, {config.precision}, "
        f"{logger.description}"
    ]
    lines += [f"note: {note}" for note in state.model.notes()]
    if (note := initial_share_note(state.ema.by_name[MAIN], MAIN, state.total_steps)) is not None:
        lines.append(f"note: {note}")
    print("\n".join(lines), file=sys.stderr)


def _summary(folder: RunFolder, state: TrainState) -> str:
    """Return one line on how the run ended."""
    parts = [f"{folder.path}: step {state.step}"]
    if metrics := read_lines(folder.metrics):
        parts.append(f"loss {metrics[-1]['loss']:.4f}")
    if evaluations := distance_records(folder):
        last = evaluations[-1]
        parts.append(f"Frechet distance on {last['feature_extractor']} {last['frechet_distance']:.1f}")
        if last["recognized_fraction"] is not None:
            parts.append(f"{100 * last['recognized_fraction']:.1f}% recognized")
    return ", ".join(parts)


def settle_training(config: DictConfig, words: list[str]) -> None:
    """Settle the logger, and take ``data`` from the shards."""
    settle_logger(config)
    settle_by_shards(config, words)


if __name__ == "__main__":
    start("train")
