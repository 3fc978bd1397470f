"""``ditscale train``: shards to a run folder. The same command continues a run that was stopped."""

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
from train.runfolder import RunFolder
from train.signals import EX_TEMPFAIL, Stopped, StopSignals, watched
from train.state import TrainState


def train_job(config: TrainSettings, progress: ProgressBar) -> None:
    """Train, or continue to train, the run in ``run_dir``. What does not fit is refused before anything is written.

    With ``replay``, look at the last step of a diverged run instead.
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
    stopped = False
    with runtime.together(), folder.locked() if runtime.is_main else nullcontext(), StopSignals() as signals:
        kept = redacted_config(config.plain())  # no file of the run gets to see more
        _require_this_run(folder, kept, config.resume.allow, runtime)
        _restore(folder, state, manifest, config.checkpoint_every, runtime)
        logger = _logger(config, folder, runtime)
        try:
            begun = run.begin(state)
            hooks = _hooks(config, state, runtime, generator, manifest, folder, logger, progress, signals, begun.guard)
            if runtime.is_main:
                folder.write_config(kept)  # now that nothing refuses it
                _tell(folder, state, config, logger, runtime)
            evaluated = len(read_lines(folder.evaluations))
            host_batches = prefetch(batches.from_step(state.step, config.total_steps))
            train(state, begun.step, host_batches, runtime, hooks)
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
        if len(read_lines(folder.evaluations)) > evaluated:  # also where a killed run still owed its last one
            from launch.report import update_group  # its plotting library would cost every start two seconds

            update_group(Path(config.sweep_dir), config.group, config.logger)
        print(_summary(folder, state))


def _run_folder(config: TrainSettings) -> RunFolder:
    path = Path(config.run_dir)
    return RunFolder(path) if config.remote_dir is None else MirroredRunFolder(path, config.remote_dir)


def _leave_for_requeue(folder: RunFolder, state: TrainState, runtime: Processes) -> NoReturn:
    """Exit as one who wants to be started again."""
    if runtime.is_main:
        print(f"{folder.path}: stopped and saved at step {state.step}; the same command continues.", file=sys.stderr)
    sys.exit(EX_TEMPFAIL)


def _require_this_run(folder: RunFolder, config: Mapping[str, Any], allowed: Iterable[str], runtime: Processes) -> None:
    """The main process finds that the folder is this run's, or nobody's."""
    if runtime.is_main:
        folder.require(config, free_settings(TrainSettings), allowed, as_now)
    runtime.wait()


def _restore(
    folder: RunFolder, state: TrainState, manifest: Manifest, checkpoint_every: int, runtime: Processes
) -> None:
    """Continue from the newest good checkpoint, and take back what was written after it."""
    path, complaints = load_newest(folder.store, state)
    if path is None:
        folder.require_no_lost_checkpoint(checkpoint_every)
    else:
        trained_on = read_state_file(path)["data_manifest_hash"]
        if trained_on != manifest.hash:
            raise ValueError(
                f"The run {folder.path} was trained on shards with manifest {trained_on[:12]}, but data.shards has "
                f"{manifest.hash[:12]}; give back the old shards or start a new run."
            )
    if runtime.is_main:
        for complaint in complaints:
            print(f"warning: {complaint} Continuing from step {state.step}.", file=sys.stderr)
    runtime.wait()  # every process has read the lines before the main one takes some back
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
    """What identifies the run, in its checkpoints and in a dump."""
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
    """Raise the error again, after what its step can be looked at with was kept where the config wants it."""
    if not config.dump_nonfinite:
        raise error
    path = folder.dump(error.step)
    remark = f"`ditscale train replay={path}` shows what went wrong in that step."
    if runtime.is_main:
        try:
            write_dump(path, folder.store, error, facts, runtime.data_world)
        except (OSError, ValueError) as failure:  # no reason to hide why the run ended
            remark = f"What led to it could not be kept for replay: {failure}."
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
    """Everything around the steps; an evaluation's extractor and reference are made before training starts."""
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
    evaluator = build_evaluator(config, generator.runtime, progress)
    evaluator.require(generator.spec.image_size, generator.spec.num_classes)

    # Settings, source and data decide the weights of a step, so what a killed run kept of it is of the same weights.
    origin = {**facts_of_process(config.plain()), "manifest": manifest.hash, "protocol": asdict(evaluator.protocol)}
    chunks = TrainingChunks(folder.path / CHUNKS, {**origin, "feature_extractor": evaluator.extractor.hash})

    def measure(store: ChunkStore) -> dict[str, Any]:
        return evaluator.evaluate(generator, progress, store)

    def facts(images_seen: int) -> dict[str, Any]:
        return model_facts(model, images_seen, "ema", config.seed)

    identity = {"weights": "ema", **evaluator.identity}
    hook = EvaluationHook(config.evaluate_every, measure, chunks, facts, identity, folder, logger, generator.runtime)
    hook.require_one_protocol()
    return hook


def _tell(folder: RunFolder, state: TrainState, config: TrainSettings, logger: Logger, runtime: Processes) -> None:
    """Say on stderr what is about to be trained, and what of it the user may not want."""
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
    """One line on how the run ended."""
    parts = [f"{folder.path}: step {state.step}"]
    if metrics := read_lines(folder.metrics):
        parts.append(f"loss {metrics[-1]['loss']:.4f}")
    if evaluations := distance_records(folder):
        last = evaluations[-1]
        parts.append(f"Frechet distance on {last['feature_extractor']} {last['frechet_distance']:.1f}")
        if last["recognized_fraction"] is not None:
            parts.append(f"{100 * last['recognized_fraction']:.1f}% recognised")
    return ", ".join(parts)


def settle_training(config: DictConfig, words: list[str]) -> None:
    """Settle the logger, and take ``data`` from the shards."""
    settle_logger(config)
    settle_by_shards(config, words)


if __name__ == "__main__":
    start("train")
