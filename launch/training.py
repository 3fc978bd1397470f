"""What a run and the replay of its last step build in the same way."""

from collections.abc import Mapping
from typing import Any

from data.batches import TrainingBatches
from data.conditions import ConditionSource
from data.shards import MappedShards
from diffusion.objective import Objective
from launch.components import build
from launch.starting_weights import load_starting_weights
from model.autoencoder import Autoencoder
from model.dit import DiT
from runtime.protocol import Devices, Processes
from train.ema import Averages
from train.guards import SpikeGuard
from train.state import TrainState


def training_batches(
    config: Mapping[str, Any],
    shards: MappedShards,
    autoencoder: Autoencoder,
    conditions: ConditionSource,
    objective: Objective,
    rank: int,
    world: int,
) -> TrainingBatches:
    """The batches of a config, of process ``rank`` of ``world``."""
    return TrainingBatches(
        shards,
        build(config["data"]["order"])(config["seed"], shards.counts),
        autoencoder,
        conditions,
        seed=config["seed"],
        batch_size=config["batch_size"],
        times=objective.times,
        class_dropout=config["class_dropout"],
        flip=config["data"]["flip"],
        rank=rank,
        world=world,
    )


def new_state(config: Mapping[str, Any], objective: Objective, runtime: Processes, starts_anew: bool) -> TrainState:
    """State at step 0, on the host: weights from ``init_from`` or the seed, their average, the optimizer."""
    model: DiT = build(config["model"], outputs_per_channel=objective.outputs_per_channel)
    model.initialize(config["seed"])
    if starts_anew and config["init_from"] is not None:
        for note in load_starting_weights(model, config["init_from"]):
            if runtime.is_main:
                print(f"note: {note}")
    ema: Averages = build(config["ema"])(model)
    optimizer = build(config["optimizer"])(model.parameters())
    return TrainState(model, ema, optimizer, config["batch_size"], config["total_steps"])


def spike_guard(config: Mapping[str, Any], state: TrainState, runtime: Devices) -> SpikeGuard | None:
    """What leaves out steps, if the config wants it."""
    factor = config["skip_grad_norm"]
    return None if factor is None else SpikeGuard(factor, state.optimizer, runtime)
