"""Scalars of each job, typed; sections that are built from ``_target_`` are checked by `launch.check`."""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class TrainSchema:
    """``ditscale train``. The defaults are the paper's recipe."""

    data: Any = MISSING
    model: Any = MISSING
    diffusion: Any = MISSING
    optimizer: Any = MISSING
    ema: Any = MISSING
    logger: Any = MISSING
    sampler: Any = MISSING
    guidance: Any = MISSING
    evaluation: Any = MISSING
    runtime: Any = MISSING

    group: str = "dit"  # of runs that are compared with each other
    name: str = "d${model.width}-n${model.depth}-p${model.patch_size}-${hydra:runtime.choices.model/block}-seed${seed}"
    sweep_dir: str = "runs/${group}"
    run_dir: str = "${sweep_dir}/${name}"

    seed: int = 0  # of weights, order, draws
    total_steps: int = 400_000
    batch_size: int = 256  # global, over all processes
    class_dropout: float = 0.1  # fraction of labels replaced by the null class
    max_grad_norm: float | None = None  # null: gradients are not clipped
    precision: str = "bf16"  # of the network: fp32 or bf16

    log_every: int = 100  # steps
    checkpoint_every: int = 10_000  # steps, a multiple of log_every
    keep_checkpoints: int = 2
    sample_every: int | None = 10_000  # steps between sample grids; null: never
    evaluate_every: int | None = None  # steps between evaluations; null: never


@dataclass
class EncodeSchema:
    """``ditscale encode``."""

    data: Any = MISSING
    seed: int = 0  # of the fixed permutation that mixes classes over shards
    batch_size: int = 64  # images in one call of the autoencoder


@dataclass
class SampleSchema:
    """``ditscale sample``."""

    sampler: Any = MISSING
    guidance: Any = MISSING
    runtime: Any = MISSING
    checkpoint: str = MISSING  # a run folder (its newest checkpoint) or one checkpoint's folder
    weights: str = "ema"  # ema or model
    num_images: int = 80
    labels: list[int] | None = None  # repeated to num_images; null: balanced over all classes
    batch_size: int = 64  # images per process at once; changes no image
    seed: int = 0
    out: str | None = None  # path without ending of the .png and .npz; null: in the run's samples/
    precision: str = "fp32"


@dataclass
class EvaluateSchema:
    """``ditscale evaluate``."""

    data: Any = MISSING
    sampler: Any = MISSING
    guidance: Any = MISSING
    evaluation: Any = MISSING
    runtime: Any = MISSING
    checkpoint: str = MISSING
    weights: str = "ema"
    precision: str = "fp32"


@dataclass
class ReportSchema:
    """``ditscale report``."""

    logger: Any = MISSING
    sweep: str = MISSING  # folder that holds the runs
    out: str = "${sweep}/report"  # folder


def register() -> None:
    """Make the schemas known to Hydra under ``{job}_schema``."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainSchema)
    store.store(name="encode_schema", node=EncodeSchema)
    store.store(name="sample_schema", node=SampleSchema)
    store.store(name="evaluate_schema", node=EvaluateSchema)
    store.store(name="report_schema", node=ReportSchema)
