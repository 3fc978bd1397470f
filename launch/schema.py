"""Scalars of each job, typed; sections that are built from ``_target_`` are checked by `launch.check`."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from launch.sweep_processes import register_launcher


class Precision(Enum):
    """Of the network's forward and backward pass; everything else is float32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Device(Enum):
    """Where a network runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class DataSchema:
    """Images, and the shards of their latents."""

    source: Any = MISSING
    autoencoder: Any = MISSING
    crop: Any = MISSING
    name: str = MISSING
    image_size: int = MISSING  # pixels
    apply_exif: bool = MISSING  # turn images as their camera says
    flip: bool = MISSING  # train on mirrored images too
    shards: str = MISSING  # folder, or a URL to read from: s3://, gs://, http(s)://
    order: Any = None  # of the samples in training
    cache: str = "cache/shards"  # folder on a local disk for shards that are read from a URL
    cache_bytes: int = 32 * 2**30  # that it may take
    samples_per_shard: int = MISSING
    verify_checksums: bool = MISSING  # read every shard once at the start


class Labels(Enum):
    """Of generated images: i modulo the number of classes, or uniform draws."""

    balanced = "balanced"
    random = "random"


@dataclass
class EvaluationSchema:
    """How samples are measured."""

    features: Any = MISSING
    reference: str | None = None  # an .npz of ADM's or of `ditscale reference`; null: all images of data.source
    metrics: list[str] = MISSING  # names under `metric`
    metric: Any = MISSING  # settings of each
    num_images: int = MISSING
    labels: Labels = MISSING
    batch_size: int = MISSING  # images of a process at once; changes no number
    seed: int = MISSING  # of the sampling noise, and of random labels
    image_file: Any = MISSING  # where `ditscale evaluate` keeps the images
    cache: str = MISSING  # folder of what is computed once: features and roots of references


@dataclass
class ResumeSchema:
    """What a run may change when it continues."""

    allow: list[str] = field(default_factory=list)  # settings, besides those that are free


@dataclass
class TrainSchema:
    """``ditscale train``. The defaults are the paper's recipe."""

    data: DataSchema = field(default_factory=DataSchema)
    condition: Any = MISSING  # what samples are conditioned on
    model: Any = MISSING
    diffusion: Any = MISSING
    optimizer: Any = MISSING
    ema: Any = MISSING
    logger: Any = MISSING
    sampler: Any = MISSING
    guidance: Any = MISSING
    evaluation: EvaluationSchema = field(default_factory=EvaluationSchema)
    runtime: Any = MISSING

    group: str = "dit"  # of runs that are compared with each other
    # what the studies vary; a sweep over more adds it: 'name=${default_name}-lr${optimizer.lr}'
    default_name: str = (
        "d${model.width}-n${model.depth}-p${model.patch_size}-${hydra:runtime.choices.model/block}-seed${seed}"
    )
    name: str = "${default_name}"
    sweep_dir: str = "runs/${group}"
    run_dir: str = "${sweep_dir}/${name}"
    remote_dir: str | None = None  # gs:// or s3:// URL that holds the run; run_dir is then its working copy
    resume: ResumeSchema = field(default_factory=ResumeSchema)
    replay: str | None = None  # RUN/nonfinite_STEP of a diverged run: look at that step, train nothing
    dump_nonfinite: bool = True  # keep a link to the last checkpoint and the config of a diverged run, for replay

    init_from: str | None = None  # weights to start with: ours, a released .pt, a diffusers folder or a hub name
    seed: int = 0  # of weights, order, draws
    total_steps: int = 400_000
    batch_size: int = 256  # global, over all processes
    class_dropout: float = 0.1  # fraction of labels replaced by the null class
    max_grad_norm: float | None = None  # null: gradients are not clipped
    skip_grad_norm: float | None = None  # leave out steps whose gradient norm exceeds the running median so many times
    precision: Precision = Precision.bf16
    activation_checkpointing: bool = False  # recompute each block in the backward pass: a third more compute

    log_every: int = 100  # steps
    checkpoint_every: int = 10_000  # steps
    keep_checkpoints: int = 2  # the newest so many
    keep_checkpoint_every: int | None = None  # steps between checkpoints that stay for ever; null: none does
    sample_every: int | None = 10_000  # steps between sample grids; null: never
    evaluate_every: int | None = None  # steps between evaluations; null: never


@dataclass
class EncodeSchema:
    """``ditscale encode``."""

    data: DataSchema = field(default_factory=DataSchema)
    encoding: Any = MISSING
    seed: int = 0  # of the fixed permutation that mixes classes over shards
    batch_size: int = 64  # images in one call of the autoencoder; another size may round otherwise
    device: Device = Device.auto
    threads: int | None = None  # that read and crop images; null: this process's share of the cores
    max_skipped_fraction: float = 0.01  # of images that cannot be read; the job fails past it


@dataclass
class VerifySchema(EncodeSchema):
    """``ditscale verify``. With ``repair``, the settings are those that the shards were encoded with."""

    repair: bool = False  # encode what is damaged again


@dataclass
class ForeignSchema:
    """Settings that weights of other programs leave open; null: the usual value."""

    num_heads: int | None = None  # of a released .pt of a width that is none of the paper's
    num_classes: int | None = None  # where the label table's last row may be a class or the null class
    frequency_shift: int | None = None  # null: 1 of a diffusers folder, as it computes, else 0, as of published weights


@dataclass
class SampleSchema:
    """``ditscale sample``. ``data`` and ``diffusion`` are of a foreign checkpoint; ours carries its own."""

    data: Any = MISSING
    diffusion: Any = MISSING
    foreign: ForeignSchema = field(default_factory=ForeignSchema)
    sampler: Any = MISSING
    guidance: Any = MISSING
    runtime: Any = MISSING
    checkpoint: str = MISSING  # a run folder (its newest checkpoint), one checkpoint's folder, or foreign weights
    weights: str = "ema"  # model, an average, width_W of a run with power averages, or a table of a foreign file
    num_images: int = 80
    labels: list[Any] | None = None  # numbers or names of classes, repeated to num_images; null: balanced over all
    batch_size: int = 64  # images per process at once; changes no image
    seed: int = 0
    out: str | None = None  # path without ending of the .png and .npz; null: in the run's samples/
    precision: Precision = Precision.fp32


@dataclass
class EvaluateSchema:
    """``ditscale evaluate``."""

    data: DataSchema = field(default_factory=DataSchema)
    sampler: Any = MISSING
    guidance: Any = MISSING
    evaluation: EvaluationSchema = field(default_factory=EvaluationSchema)
    runtime: Any = MISSING
    checkpoint: str = MISSING
    weights: str = "ema"  # model, an average of the checkpoint, or width_W of a run with power averages
    precision: Precision = Precision.fp32
    compile: bool = False  # the network's blocks: a minute at first, then faster on a GPU
    metrics: list[str] = "${evaluation.metrics}"  # type: ignore[assignment]  # and nll: bits per dimension


class Program(Enum):
    """Where exported weights go."""

    reference = "reference"
    diffusers = "diffusers"


@dataclass
class ExportSchema:
    """``ditscale export``."""

    foreign: ForeignSchema = field(default_factory=ForeignSchema)
    checkpoint: str = MISSING
    weights: str = "ema"  # model, an average, width_W of a run with power averages, or a table of a foreign file
    to: Program = MISSING
    out: str = MISSING  # a .pt file for reference, a folder for diffusers


class Format(Enum):
    """For people or for programs."""

    text = "text"
    json = "json"


@dataclass
class PlanSchema:
    """``ditscale plan``. Of ``data`` it takes sizes and counts, and reads no image."""

    data: DataSchema = field(default_factory=DataSchema)
    model: Any = MISSING
    diffusion: Any = MISSING
    name: str = "d${model.width}-n${model.depth}-p${model.patch_size}-${hydra:runtime.choices.model/block}"
    total_steps: int = 400_000
    batch_size: int = 256  # global
    precision: Precision = Precision.bf16
    devices: int = 8
    peak_tflops: float = 989.0  # true FLOPs of a device in that precision, dense; an H100's or H200's in bf16
    utilization: float = 0.4  # of the peak
    sampling_steps: int = 250
    num_samples: int = 1_281_167  # images in the shards: ImageNet's
    flip: bool = True  # both orientations stored
    format: Format = Format.text


@dataclass
class ReferenceSchema:
    """``ditscale reference``."""

    data: DataSchema = field(default_factory=DataSchema)
    evaluation: EvaluationSchema = field(default_factory=EvaluationSchema)
    images: Any = MISSING
    runtime: Any = MISSING
    num_kept: int = 10_000  # images in the file, for precision and recall; ADM's number
    batch_size: int = 250  # images of a process at once
    seed: int = 0  # of the choice of kept images
    out: str = MISSING  # the .npz


@dataclass
class ReportSchema:
    """``ditscale report``."""

    logger: Any = MISSING
    sweep: str = MISSING  # folder that holds the runs
    out: str = "${sweep}/report"  # folder
    samples: int = 8  # of each model, for figure 7; 0: none
    sampler: Any = MISSING  # of figure 7
    guidance: Any = MISSING
    runtime: Any = MISSING
    seed: int = 0  # of figure 7
    precision: Precision = Precision.fp32


def register() -> None:
    """Make the schemas known to Hydra under ``{job}_schema``, and the launcher of sweeps."""
    register_launcher()
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainSchema)
    store.store(name="encode_schema", node=EncodeSchema)
    store.store(name="verify_schema", node=VerifySchema)
    store.store(name="sample_schema", node=SampleSchema)
    store.store(name="evaluate_schema", node=EvaluateSchema)
    store.store(name="export_schema", node=ExportSchema)
    store.store(name="plan_schema", node=PlanSchema)
    store.store(name="report_schema", node=ReportSchema)
    store.store(name="reference_schema", node=ReferenceSchema)
