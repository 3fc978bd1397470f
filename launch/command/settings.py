"""The settings of each job. `launch.command.check` checks the sections that are built from ``_target_``."""

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar, Protocol

from hydra.core.config_store import ConfigStore

from core.fields import MUST_BE_GIVEN, Settings, free, positive
from data.settings import DataSettings
from evaluation.settings import EvaluationSettings
from launch.command.sweep_processes import register_launcher
from launch.slurm.launcher import register_slurm

LOCAL_HOSTS = ("127.0.0.1", "localhost")  # which no other machine reaches


class Precision(StrEnum):
    """The precision of the network's forward and backward pass; everything else is float32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Generator(StrEnum):
    """The generator of training's random numbers, with its version, which is part of its name."""

    numpy = "numpy"
    philox32_v1 = "philox32_v1"


class Device(StrEnum):
    """The device that a network runs on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class ResumeSettings(Settings):
    """Settings of a run that continues."""

    allow: list[str] = field(default_factory=list)  # settings that may change, besides those that always may


@dataclass
class TrainSettings(Settings):
    """``ditscale train``. The defaults are the paper's recipe."""

    data: DataSettings = field(default_factory=DataSettings)
    condition: Any = MUST_BE_GIVEN  # what samples are conditioned on
    text_encoder: Any = free(None)  # that of the shards' captions, for a condition of text
    model: Any = MUST_BE_GIVEN
    diffusion: Any = MUST_BE_GIVEN
    alignment: Any = MUST_BE_GIVEN  # with features of a teacher, beside the objective
    optimizer: Any = MUST_BE_GIVEN
    ema: Any = MUST_BE_GIVEN
    logger: Any = free()
    notice: Any = free()  # of a preemption
    sampler: Any = free()
    guidance: Any = free()
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings, metadata={"free": True})
    runtime: Any = free()

    group: str = free("dit")  # name of the group of runs that are compared with each other
    shape_name: str = free()  # name of the network's shape, from the properties that the studies vary
    # a sweep over more than shape and seed adds to the name: 'name=${default_name}-lr${optimizer.lr}'
    default_name: str = free("${shape_name}-seed${seed}")
    name: str = free("${default_name}")
    sweep_dir: str = free("runs/${group}")
    run_dir: str = free("${sweep_dir}/${name}")
    remote_dir: str | None = free(None)  # gs:// or s3:// URL where the run is stored; run_dir is then its working copy
    resume: ResumeSettings = field(default_factory=ResumeSettings, metadata={"free": True})
    replay: str | None = free(None)  # RUN/nonfinite_STEP of a diverged run: examine that step, train nothing
    dump_nonfinite: bool = free(True)  # keep a link to the last checkpoint and the config of a diverged run, for replay

    init_from: str | None = free(None)  # weights to start with: ours, a released .pt, a diffusers folder or a hub name
    seed: int = 0  # of initial weights, order of samples, and random draws
    generator: Generator = Generator.numpy  # of random draws; philox32_v1 is faster
    total_steps: int = positive(400_000)
    batch_size: int = positive(256)  # global, over all processes
    class_dropout: float = 0.1  # fraction of labels replaced by the null class
    max_grad_norm: float | None = positive(None)  # null: gradients are not clipped
    skip_grad_norm: float | None = None  # skip steps whose gradient norm exceeds this many times the running median
    precision: Precision = Precision.bf16
    activation_checkpointing: bool = free(False)  # recompute each block in the backward pass: a third more compute

    log_every: int = positive(100)  # steps
    checkpoint_every: int = positive(10_000, free=True)  # steps
    checkpoint_every_min: float | None = positive(None, free=True)  # minutes, where fewer; null: by steps alone
    keep_checkpoints: int = positive(2, free=True)  # number of the newest checkpoints that are kept
    keep_checkpoint_every: int | None = positive(
        None, free=True
    )  # steps between checkpoints that are kept forever; null: none is
    sample_every: int | None = positive(10_000, free=True)  # steps between sample grids; null: never
    evaluate_every: int | None = positive(None, free=True)  # steps between evaluations; null: never

    def __post_init__(self) -> None:
        super().__post_init__()
        kept, every = self.keep_checkpoint_every, self.checkpoint_every
        if kept is not None and kept % every:
            raise ValueError(
                f"keep_checkpoint_every {kept} is not a multiple of checkpoint_every {every}, so few or no checkpoints "
                "would be kept; change one of them."
            )
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(
                f"class_dropout is {self.class_dropout}, but it is a fraction between 0 and 1; the paper uses 0.1."
            )


@dataclass
class EncodeSettings(Settings):
    """``ditscale encode``."""

    data: DataSettings = field(default_factory=DataSettings)
    encoding: Any = MUST_BE_GIVEN
    teacher: Any = None  # network whose features of the images are stored too
    captions: Any = None  # captions in place of those of the source
    text_encoder: Any = None  # whose token ids of the captions are stored too
    text_embeddings: bool = False  # whether its embeddings of the captions are stored as well
    seed: int = 0  # of the fixed permutation that mixes the classes across shards
    batch_size: int = positive(64)  # images per call of the autoencoder; another size may round differently
    device: Device = Device.auto
    threads: int | None = None  # number of threads that read and crop images; null: this process's share of the cores
    max_skipped_fraction: float = 0.01  # of images that cannot be read; above it, the job fails

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ValueError(
                f"max_skipped_fraction is {self.max_skipped_fraction}, but a fraction is between 0 and 1; set another."
            )
        if self.text_embeddings and self.text_encoder is None:
            raise ValueError(
                "text_embeddings is true, but there is no text encoder; choose data/text_encoder=clip or t5, or set "
                "text_embeddings=false."
            )


@dataclass
class VerifySettings(EncodeSettings):
    """``ditscale verify``. With ``repair``, give the settings that the shards were encoded with."""

    repair: bool = False  # encode damaged shards again


@dataclass
class ForeignSettings(Settings):
    """Settings that the files of other programs do not state; null: the usual value."""

    family: str | None = None  # such as DiT, SiT, LDM, SD; null: by the tensors' names, and the trainer's arguments
    num_heads: int | None = None  # for a DiT whose width is not one of the paper's; ADM: for 4 heads; LDM, SD
    head_dim: int | None = None  # channels of a head, in place of num_heads; ADM, LDM, SD
    latent_size: int | None = None  # side of the latents of a U-Net; null: 8 at its coarsest level, as published
    num_classes: int | None = None  # needed where the label table's last row may be a class or the null class
    frequency_shift: int | None = None  # null: 1 for a diffusers folder, as diffusers computes; else 0, as published
    new_attention_order: bool | None = None  # ADM: order of queries, keys, values; null: the older, as published


@dataclass
class ForeignData(Settings):
    """The part of ``data`` that foreign weights need."""

    section: ClassVar[str] = "data"

    autoencoder: Any = MUST_BE_GIVEN
    normalize: bool = False  # whether the network was trained on latents of mean 0 and standard deviation 1
    latent_mean: list[float] | None = None  # of unscaled latents, by channel, where normalize is set
    latent_std: list[float] | None = None  # likewise


@dataclass
class GeneratingSettings(Settings):
    """Settings of jobs that only generate. ``data`` and ``diffusion`` are of foreign checkpoints only."""

    data: ForeignData = field(default_factory=ForeignData)
    diffusion: Any = MUST_BE_GIVEN
    foreign: ForeignSettings = field(default_factory=ForeignSettings)
    sampler: Any = MUST_BE_GIVEN
    guidance: Any = MUST_BE_GIVEN
    runtime: Any = MUST_BE_GIVEN
    checkpoint: str = MUST_BE_GIVEN  # a run folder (its newest checkpoint is used), a checkpoint, or foreign weights
    weights: str = "ema"  # model, an average, width_W of a run with power averages, or a table of a foreign file
    num_images: int = positive(80)
    low_resolution: str | None = None  # .npz of the images that an upsampler enlarges, as `sample` writes them
    text_encoder: Any = None  # of a network for text; null: as the run's config says
    prompts: Any = None  # a text, several, or a file of them (.txt, .jsonl, COCO's .json); null: the run's
    negative_prompt: str | None = None  # takes the place of the empty caption in guidance
    batch_size: int = positive(64)  # images per process at once; does not change any image
    seed: int = 0
    precision: Precision = Precision.fp32


@dataclass
class SampleSettings(GeneratingSettings):
    """``ditscale sample``."""

    labels: list[Any] | None = None  # class numbers or names, repeated up to num_images; null: all classes in turn
    out: str | None = None  # path of the .png and .npz, without extension; null: in the run's samples/


@dataclass
class ServeSettings(GeneratingSettings):
    """``ditscale serve``. The sampler, the guidance, the seed and the number of images are those the page begins with.

    Raises ValueError for a host that other machines can reach, without ``allow_remote``, and for a port that is none.
    """

    num_images: int = positive(20)
    host: str = "127.0.0.1"  # address of this machine that the page is served at; 127.0.0.1 is reached from it alone
    port: int = 7860  # 0: any that is free
    allow_remote: bool = False  # allow another host: whoever reaches it uses the page, without a password
    show_every: int = positive(5)  # calls of the network between two views of unfinished images

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.host not in LOCAL_HOSTS and not self.allow_remote:
            raise ValueError(
                f"host is {self.host}, which other machines may reach, and the page asks for no password; use "
                "host=127.0.0.1, or set allow_remote=true if everybody who reaches it may use it."
            )
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}, but ports are from 1 to {2**16 - 1}, and 0 is any; set another.")


@dataclass
class EvaluateSettings(Settings):
    """``ditscale evaluate``. ``diffusion`` and ``foreign`` apply to foreign checkpoints only, as for `sample`."""

    data: DataSettings = field(default_factory=DataSettings)
    diffusion: Any = MUST_BE_GIVEN
    foreign: ForeignSettings = field(default_factory=ForeignSettings)
    sampler: Any = MUST_BE_GIVEN
    guidance: Any = MUST_BE_GIVEN
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    runtime: Any = MUST_BE_GIVEN
    checkpoint: str = MUST_BE_GIVEN  # a run folder (its newest checkpoint is used), a checkpoint, or foreign weights
    weights: str = "ema"  # model, an average, width_W of a run with power averages, or a table of a foreign file
    precision: Precision = Precision.fp32
    compile: Any = False  # true: its blocks, a minute at first, then faster on a GPU; where_possible: whole on a CPU
    metrics: list[str] = "${evaluation.metrics}"  # type: ignore[assignment]  # may also have nll: bits per dimension
    low_resolution: str | None = None  # .npz of the images that an upsampler enlarges, as `sample` writes them
    text_encoder: Any = None  # of a network for text; null: as the run's config says
    prompts: Any = None  # a text, several, or a file of them (.txt, .jsonl, COCO's .json); null: the run's
    negative_prompt: str | None = None  # takes the place of the empty caption in guidance

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile not in (True, False, "where_possible"):
            raise ValueError(f"compile is {self.compile!r}, but there are true, false and where_possible; set one.")


class SamplingSettings(Protocol):
    """The settings that all jobs that generate images have."""

    sampler: Any
    guidance: Any
    runtime: Any


class Program(StrEnum):
    """The program that weights are exported for."""

    reference = "reference"
    diffusers = "diffusers"
    sit = "sit"
    lightningdit = "lightningdit"
    adm = "adm"
    ldm = "ldm"
    sd = "sd"


@dataclass
class ExportSettings(Settings):
    """``ditscale export``."""

    foreign: ForeignSettings = field(default_factory=ForeignSettings)
    checkpoint: str = MUST_BE_GIVEN
    weights: str = "ema"  # model, an average, width_W of a run with power averages, or a table of a foreign file
    to: Program = MUST_BE_GIVEN
    out: str = MUST_BE_GIVEN  # a .pt file for reference, sit and lightningdit, a folder for diffusers


class Format(StrEnum):
    """The format of the output: text for people, JSON for programs."""

    text = "text"
    json = "json"


@dataclass
class PlanSettings(Settings):
    """``ditscale plan``. It takes sizes and counts from ``data``, and reads no image."""

    data: DataSettings = field(default_factory=DataSettings)
    model: Any = MUST_BE_GIVEN
    diffusion: Any = MUST_BE_GIVEN
    alignment: Any = MUST_BE_GIVEN
    teacher: Any = None  # network whose features of the images are stored too; its weights are not read
    feature_tokens: int | None = positive(None)  # of those features for an image; null: the shards' or the teacher's
    feature_dim: int | None = positive(None)  # numbers of such a token; likewise
    text_embeddings: bool = False  # the shards store the embedding of a caption for each image
    text_length: int | None = positive(None)  # tokens of that embedding; null: the shards' or the network's
    text_dim: int | None = positive(None)  # numbers of such a token; likewise
    shape_name: str = MUST_BE_GIVEN  # name of the network's shape, from its own config
    name: str = "${shape_name}"
    total_steps: int = positive(400_000)
    batch_size: int = positive(256)  # global
    precision: Precision = Precision.bf16
    devices: int = positive(8)
    peak_tflops: float = positive(989.0)  # of a device in that precision, dense; the default is an H100's in bf16
    utilization: float = positive(0.4)  # fraction of the peak
    sampling_steps: int = 250
    grace_sec: float = positive(30.0)  # between a notice of preemption and the end; a spot machine's
    write_gb_per_sec: float = positive(1.0)  # at which the place of the checkpoints takes them
    num_samples: int = positive(1_281_167)  # images in the shards; the default is ImageNet's
    flip: bool = True  # both orientations are stored
    format: Format = Format.text


@dataclass
class StatusSettings(Settings):
    """``ditscale status``."""

    sweep: str = MUST_BE_GIVEN  # folder that holds the runs
    silent_min: float = positive(15.0)  # a run that wrote nothing for so many minutes is reported as silent
    format: Format = Format.text


@dataclass
class ReferenceSettings(Settings):
    """``ditscale reference``."""

    data: DataSettings = field(default_factory=DataSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    images: Any = MUST_BE_GIVEN
    runtime: Any = MUST_BE_GIVEN
    num_kept: int = positive(10_000)  # images kept in the file, for precision and recall; ADM's number
    batch_size: int = positive(250)  # images per process at once
    seed: int = 0  # of the choice of kept images
    out: str = MUST_BE_GIVEN  # the .npz


@dataclass
class ReportSettings(Settings):
    """``ditscale report``."""

    logger: Any = MUST_BE_GIVEN
    sweep: str = MUST_BE_GIVEN  # folder that holds the runs, or the study.jsonl of a report
    out: str | None = None  # folder; null: report in the sweep's folder, or beside its file
    samples: int = 8  # of each model, for figure 7; 0: none
    sampler: Any = MUST_BE_GIVEN  # of figure 7
    guidance: Any = MUST_BE_GIVEN
    runtime: Any = MUST_BE_GIVEN
    seed: int = 0  # of figure 7
    precision: Precision = Precision.fp32


SETTINGS: dict[str, type[Settings]] = {
    "train": TrainSettings,
    "encode": EncodeSettings,
    "verify": VerifySettings,
    "sample": SampleSettings,
    "serve": ServeSettings,
    "evaluate": EvaluateSettings,
    "export": ExportSettings,
    "plan": PlanSettings,
    "report": ReportSettings,
    "status": StatusSettings,
    "reference": ReferenceSettings,
}


@cache
def register() -> None:
    """Register with Hydra, once, the settings of each job, as ``{job}_schema``, and the launchers of sweeps."""
    register_launcher()
    register_slurm()
    for job, kind in SETTINGS.items():
        ConfigStore.instance().store(name=f"{job}_schema", node=kind)
