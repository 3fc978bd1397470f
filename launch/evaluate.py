"""``ditscale evaluate``: measure a checkpoint and append a line to its run's ``evaluations.jsonl``."""

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from core.closest import closest
from core.progress import ProgressBar
from core.reading import DamagedFileError, sha256_of
from core.records import canonical_hash
from data.conditions import ConditionSource
from data.manifest import Manifest
from data.settings import DataSettings
from data.shards import MappedShards
from evaluation.chunks import EVALUATING, TRAINING, ChunkStore, discard
from evaluation.evaluate import Evaluator
from evaluation.generate import Generator
from evaluation.likelihood import measure_likelihood
from launch.builders.build import (
    CHUNKS,
    LoadedCheckpoint,
    build_evaluator,
    build_shards,
    model_facts,
    precision_of_products,
)
from launch.builders.components import build
from launch.builders.conditioned import conditioned
from launch.builders.data_settings import settle_by, settle_by_shards
from launch.builders.facts import code_hash, facts_of_process
from launch.builders.foreign import is_foreign, load_foreign
from launch.builders.runs import checkpoint_hash, read_checkpoint
from launch.command.settings import EvaluateSettings
from launch.jobs import start
from model.network import Network
from runtime.kernels import WHERE_POSSIBLE, compile_network, compile_where_possible, missing_for_kernels
from runtime.protocol import Devices
from train.checkpoint import code_version, read_state_file
from train.lines import append_record
from train.runfolder import RunFolder
from train.stores import STATE_FILE, list_checkpoints

_UNSAID = ("source", "num_classes", "crop", "apply_exif", "flip")  # facts on latents that foreign weights do not state
LIKELIHOOD = "nll"  # needs no generated images, so it is not a `Metric`


def evaluate_job(config: EvaluateSettings, progress: ProgressBar) -> None:
    """Generate images, measure them, append the record to the run's evaluations, and print it."""
    if not config.metrics:
        raise ValueError("metrics is empty; choose at least one, such as metrics=[frechet].")
    known = [*config.evaluation.metric, LIKELIHOOD]
    for name in config.metrics:
        if name not in known:
            raise ValueError(f"There is no metric {name!r}{closest(name, known)} The metrics are: {', '.join(known)}.")
    runtime: Devices = build(config.runtime, precision=config.precision.value)
    runtime.require_same(facts_of_process(config.plain()))
    checkpoint, records = _checkpoint(config, runtime)
    checkpoint = _conditioned(config, checkpoint, runtime)
    data = config.data
    source = data.name if is_foreign(config.checkpoint) else checkpoint.spec.source
    if (data.name, data.image_size) != (source, checkpoint.spec.image_size):
        raise ValueError(
            f"The checkpoint was trained on {source} at {checkpoint.spec.image_size} px, but the "
            f"reference would be {data.name} at {data.image_size} px; leave data out, or give the checkpoint's."
        )
    if config.compile == WHERE_POSSIBLE:
        compile_where_possible(checkpoint.model, runtime.device.type, runtime.is_main)
    elif config.compile:
        compile_units(checkpoint.model, runtime.device)
    generator = checkpoint.generator(config, config.evaluation.seed, runtime)
    evaluator, chunks = None, None
    if names := [name for name in config.metrics if name != LIKELIHOOD]:
        conditions, negative = checkpoint.conditions, config.negative_prompt
        evaluator = build_evaluator(config, runtime, progress, conditions, names, negative)
        evaluator = _of_given_images(config, evaluator)
        _tell(conditions, evaluator, runtime)
        if not is_foreign(config.checkpoint):
            chunks = EvaluationChunks(checkpoint, config.weights, evaluator)
    store = ChunkStore() if chunks is None else chunks.store
    with store.used():
        record = _record(config, checkpoint, generator, evaluator, store, progress)
        if runtime.is_main:
            append_record(records, record, sealed=True)
            print(json.dumps(record, indent=1))
        runtime.wait()  # chunks are deleted only after the record is written
    if chunks is not None:
        chunks.discard()


def _conditioned(config: EvaluateSettings, checkpoint: LoadedCheckpoint, runtime: Devices) -> LoadedCheckpoint:
    """Return the checkpoint with the images or the texts that it is conditioned on."""
    if LIKELIHOOD in config.metrics and config.low_resolution is not None:
        raise ValueError(f"metrics has {LIKELIHOOD}, which upsamplers do not have here; leave it out.")
    return conditioned(checkpoint, config, runtime)


def _tell(conditions: ConditionSource, evaluator: Evaluator, runtime: Devices) -> None:
    """Print notes on the conditions of the images on stderr."""
    if runtime.is_main:
        for note in conditions.notes(evaluator.protocol.condition_of(conditions)):
            print(f"note: {note}", file=sys.stderr)


def _of_given_images(config: EvaluateSettings, evaluator: Evaluator) -> Evaluator:
    """Return the evaluator with the hash of the images that are enlarged as a part of its protocol."""
    if config.low_resolution is None:
        return evaluator
    of_file = {"low_resolution": sha256_of(Path(config.low_resolution))}
    return replace(evaluator, protocol=replace(evaluator.protocol, sampler={**evaluator.protocol.sampler, **of_file}))


def _checkpoint(config: EvaluateSettings, runtime: Devices) -> tuple[LoadedCheckpoint, Path]:
    """Return the checkpoint and the file that its record is appended to: its run's, or one next to foreign weights."""
    if is_foreign(config.checkpoint):
        checkpoint = load_foreign(config, runtime)
        return checkpoint, checkpoint.run_dir / f"{checkpoint.path.stem}-evaluations.jsonl"
    checkpoint = LoadedCheckpoint.load(config.checkpoint, config.weights, runtime, config.text_encoder)
    folder = RunFolder(checkpoint.run_dir)
    folder.read_config()  # refuses a folder that is not a run's
    return checkpoint, folder.evaluations


def settle_evaluation(config: DictConfig, words: list[str]) -> None:
    """Take ``data`` from the checkpoint, or from ``data.shards`` where the command line gives them."""
    if is_foreign(config.checkpoint):
        if any(word.startswith("data.shards=") for word in words):
            settle_by_shards(config, words)
        return
    path, state = read_checkpoint(config.checkpoint, lambda path: (path, read_state_file(path)))
    data = state["config"].get("data")
    settle_by(config, words, data if isinstance(data, dict) else {}, str(path / STATE_FILE))
    if any(word.startswith("data.shards=") for word in words):
        settle_by_shards(config, words)


def _record(
    config: EvaluateSettings,
    checkpoint: LoadedCheckpoint,
    generator: Generator,
    evaluator: Evaluator | None,
    store: ChunkStore,
    progress: ProgressBar,
) -> dict[str, Any]:
    """Return the line for ``evaluations.jsonl``. Every process must call this."""
    weights, settings = config.weights, config.evaluation
    record = {
        "step": checkpoint.step,
        "images_seen": checkpoint.images_seen,
        "evaluated_by": "evaluate",
        **model_facts(
            checkpoint.model, checkpoint.objective, checkpoint.images_seen, weights, checkpoint.training_seed
        ),
    }
    if is_foreign(config.checkpoint):
        record["foreign"] = checkpoint.path.name
    if len(checkpoint.sources) > 1:  # the average depends on which checkpoints were kept
        record["average_of_steps"] = [source.step for source in checkpoint.sources]
    if evaluator is not None:
        record |= evaluator.evaluate(generator, progress, store, build(settings.image_file))
    if LIKELIHOOD in config.metrics:
        shards = _shards_of(checkpoint, config.data, is_foreign(config.checkpoint))
        precision = precision_of_products(config.precision.value, generator.runtime.device)
        sizes = settings.num_images, settings.batch_size, settings.likelihood_steps
        record |= measure_likelihood(generator, shards, *sizes, precision, progress)
    return record


def compile_units(model: Network, device: torch.device) -> None:
    """Compile the model unit by unit: units of one class and shape share one compilation.

    Raises ValueError under XLA, and on a CPU without the C++ compiler that PyTorch calls.
    """
    if device.type == "xla":
        raise ValueError("compile=true is for runtime=accelerate; XLA compiles by itself, so leave it out.")
    if device.type == "cpu" and (missing := missing_for_kernels("cpu")) is not None:
        other = "name another" if "CXX" in os.environ else "name yours"
        raise ValueError(
            f"compile=true needs a C++ compiler, but there is no {missing.split()[-1]}; install one, {other} by the "
            "variable CXX, or leave compile out."
        )
    compile_network(model, device.type)


class EvaluationChunks:
    """Finished chunks of this evaluation, identified by its weights, protocol, feature extractor and source code."""

    def __init__(self, checkpoint: LoadedCheckpoint, weights: str, evaluator: Evaluator) -> None:
        self._checkpoint, self._folder = checkpoint, checkpoint.run_dir / CHUNKS
        self._code = {**code_version(), "source code": code_hash()}
        way = {
            "weights": weights,
            "made of": [source.hash for source in checkpoint.sources],
            "protocol": asdict(evaluator.protocol),
            "feature_extractor": evaluator.features_hash,
            **evaluator.of_captions,
        }
        self._label = f"{self._label_of(checkpoint.hash)}{canonical_hash(way, spaced=True)[:16]}"
        self._identity = {**self._code, **way, "batch_size": evaluator.batch_size}

    def _label_of(self, hash_: str) -> str:
        """Return the prefix that this program's evaluations of a checkpoint have in their labels."""
        mine = {**self._code, "checkpoint": hash_}
        return f"{EVALUATING}{canonical_hash(mine, spaced=True)[:16]}-"

    @property
    def store(self) -> ChunkStore:
        """Return the store of this evaluation's chunks."""
        return ChunkStore(self._folder, self._identity, self._label)

    def discard(self) -> None:
        """Delete these chunks, whose result is recorded, and those of other code or of deleted checkpoints."""
        usable = [TRAINING, self._label_of(self._checkpoint.hash)]
        for path in list_checkpoints(self._checkpoint.path.parent):
            with suppress(OSError, DamagedFileError):  # deleted meanwhile by a run in progress, or damaged
                usable.append(self._label_of(checkpoint_hash(path)))
        discard(self._folder, lambda name: name.startswith(self._label) or not name.startswith(tuple(usable)))


def _shards_of(checkpoint: LoadedCheckpoint, data: DataSettings, foreign: bool) -> MappedShards:
    """Return the shards. Raises ValueError where their latents are not those that the checkpoint was trained on.

    Foreign weights do not say which images they were trained on, only the size and the autoencoder.
    """
    manifest, spec = Manifest.load(data.shards), checkpoint.spec
    if foreign:
        spec = replace(spec, **{name: getattr(manifest.spec, name) for name in _UNSAID})
    manifest.require(spec, data.shards)
    return build_shards(data)


if __name__ == "__main__":
    start("evaluate")
