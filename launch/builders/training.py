"""Prepare a run: build the objects that training and a replay of its last step both need."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from core.draws import Philox, Streams
from core.garbage import uncollected
from core.philox32 import Philox32
from data.batches import TrainingBatches
from data.conditions import ConditionSource
from data.low_resolution import LowResolution
from data.manifest import LatentSpec, Manifest
from data.shards import MappedShards
from data.text_conditions import TextCondition
from diffusion.objective import Objective
from launch.builders.alignment import fill_alignment, require_tokens
from launch.builders.build import (
    condition_source,
    expected_spec,
    fill_model,
    require_condition,
    require_outputs,
)
from launch.builders.captions import fill_condition, fill_text, sizes_in
from launch.builders.components import build
from launch.builders.data_settings import require_shards
from launch.builders.facts import facts_of_process
from launch.builders.foreign import is_foreign, read_foreign, require_family
from launch.builders.normalization import normalized, with_statistics
from launch.builders.objectives import latent_facts, settled
from launch.builders.saved_networks import load_model
from launch.builders.text_encoders import encoder_of
from launch.command.check import check_readers
from launch.command.machine import batch_threads, usable_cores
from launch.command.settings import Generator, TrainSettings
from model.autoencoder import Autoencoder
from model.family import Facts
from model.network import Network, checkpoint_units
from model.starting import take_over
from runtime.protocol import Runtime, Step
from train.alignment import REPA
from train.ema import Averages
from train.guards import SpikeGuard
from train.state import TrainState
from train.step import make_step

GENERATORS: dict[Generator, Callable[[int], Streams]] = {Generator.numpy: Philox, Generator.philox32_v1: Philox32}


@dataclass(frozen=True)
class PreparedRun:
    """The objects of a run, before its state is restored. `prepare_run` makes them."""

    config: TrainSettings  # with the settings of the model that follow from the shards
    manifest: Manifest
    spec: LatentSpec
    autoencoder: Autoencoder
    conditions: ConditionSource
    objective: Objective
    runtime: Runtime
    alignment: REPA | None = None

    def new_state(self, starts_anew: bool) -> TrainState:
        """Return the state at step 0, on the CPU: weights from ``init_from`` or the seed, averages, the optimizer."""
        return _new_state(self, starts_anew)

    def batches(self, shards: MappedShards, rank: int, world: int) -> TrainingBatches:
        """Return the batches of process ``rank`` out of ``world`` processes."""
        config = self.config
        return TrainingBatches(
            shards,
            build(config.data.order)(config.seed, shards.counts),
            self.autoencoder,
            self.conditions,
            seed=config.seed,
            batch_size=config.batch_size,
            times=self.objective.times,
            class_dropout=config.class_dropout,
            flip=config.data.flip,
            rank=rank,
            world=world,
            threads=batch_threads(usable_cores()),
            target_steps=None if self.alignment is None else self.alignment.stop_after or math.inf,
            streams=GENERATORS[config.generator],
        )

    def begin(self, state: TrainState) -> "BegunRun":
        """Move a restored state to the devices. The state gets the runtime's optimizer."""
        config, runtime = self.config, self.runtime
        if config.activation_checkpointing:  # only now: the averages, copied before, have no backward pass
            checkpoint_units(state.model, runtime.checkpoint)
        model, state.optimizer = runtime.prepare(state.model, list(state.ema.modules.values()), state.optimizer)
        factor = config.skip_grad_norm
        guard = None if factor is None else SpikeGuard(factor, state.optimizer, runtime)
        step = make_step(
            model,
            state.optimizer,
            state.ema,
            self.objective,
            runtime,
            config.max_grad_norm,
            guard,
            self.alignment,
            self.conditions.embedded,
        )
        return BegunRun(model, runtime.step(step), guard)


@dataclass(frozen=True)
class BegunRun:
    """The objects that training uses after the state is on the devices."""

    model: nn.Module  # as the runtime wrapped it
    step: Step
    guard: SpikeGuard | None


def prepare_run(config: TrainSettings, manifest: Manifest) -> PreparedRun:
    """Return the run that a config describes, on its shards.

    Raises ValueError for settings that do not fit, or that differ between processes.
    """
    autoencoder, spec = expected_spec(config.data, manifest)
    require_shards(manifest, spec, config.data.shards)
    config = replace(config, condition=fill_condition(config.condition, manifest, config.data))
    conditions = condition_source(config.condition, spec)
    _require_samples_to_enlarge(conditions, config)
    config = replace(
        config, model=fill_model(config.model, spec, conditions), data=with_statistics(config.data, manifest)
    )
    config = replace(config, model=fill_text(config.model, sizes_in(config.condition)))
    autoencoder = normalized(autoencoder, config.data, "the config")
    config = replace(config, diffusion=settled(config.diffusion, latent_facts(manifest, autoencoder)))
    features = None if manifest.teacher is None else manifest.teacher.shape
    config = replace(config, alignment=fill_alignment(config.alignment, features, config.data.shards))
    runtime: Runtime = build(config.runtime, precision=config.precision.value)
    runtime.require_same(facts_of_process(config.plain()))
    runtime.require_batch(config.batch_size)
    check_readers(runtime.data_world, len(manifest.shards))
    objective: Objective = runtime.place(build(config.diffusion))
    conditions.prepare(runtime.place, encoder_of(config.text_encoder))
    if isinstance(conditions, TextCondition) and not config.condition["stored"]:
        _ = conditions.encoder  # read now, so that one that does not fit is refused before any write
    alignment: REPA | None = build(config.alignment)
    return PreparedRun(config, manifest, spec, autoencoder, conditions, objective, runtime, alignment)


def _new_state(run: PreparedRun, starts_anew: bool) -> TrainState:
    config, objective = run.config, run.objective
    model: Network = build(config.model, outputs_per_channel=objective.outputs_per_channel)
    require_condition(model, run.conditions)
    _require_null_class(model, config.class_dropout)
    model.initialize(config.seed)
    if starts_anew and config.init_from is not None:
        for note in load_starting_weights(model, config.init_from, objective):
            if run.runtime.is_main:
                print(f"note: {note}")
    ema: Averages = build(config.ema)(model)  # before the head, of which no average is kept
    if run.alignment is not None:
        assert run.manifest.teacher is not None, "fill_alignment refuses shards without features"
        require_tokens(model, run.alignment, run.manifest.teacher.shape)
        run.alignment.attach(model, config.seed)
    with uncollected():  # PyTorch's optimizers import its compiler
        optimizer = build(config.optimizer)(model.parameters())
    return TrainState(model, ema, optimizer, config.batch_size, config.total_steps)


def _require_samples_to_enlarge(conditions: ConditionSource, config: TrainSettings) -> None:
    if isinstance(conditions, LowResolution) and config.data.normalize:
        raise ValueError(
            "data.normalize is true, but an upsampler enlarges images, whose pixels are not normalized; set "
            "data.normalize=false."
        )
    if isinstance(conditions, LowResolution) and (config.sample_every, config.evaluate_every) != (None, None):
        raise ValueError(
            "data/condition=low_resolution takes small images from the training samples, so this run cannot generate "
            "any; set sample_every=null and evaluate_every=null, and use `ditscale sample low_resolution=FILE.npz`."
        )


def _require_null_class(model: Network, class_dropout: float) -> None:
    if class_dropout > 0 and not model.has_null_class:
        raise ValueError(
            f"class_dropout is {class_dropout:g}, but the network's label table has {model.num_classes} rows for as "
            "many classes and none for dropped labels; set class_dropout=0, or model.null_class=true."
        )


def load_starting_weights(model: Network, where: str, objective: Objective) -> list[str]:
    """Fill ``model`` by ``init_from``: with weights of another program, or with the EMA of a run or checkpoint of ours.

    Returns sentences on how they were read and what was not taken over. Raises ValueError where there are no weights,
    naming both shapes where shapes differ, and for weights whose time runs the other way than the objective's.
    """
    if is_foreign(where):
        network = read_foreign(where, "ema", Facts(like=model))
        require_family(network, objective)
        found, notes = network.model, list(network.notes)
    else:
        found, notes = load_model(where, "ema", objective, "init_from"), []
    require_outputs(found, objective, of=where)
    return [*notes, *take_over(model, found, where)]
