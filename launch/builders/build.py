"""Build the objects of a job from a resolved config."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from core.batch import Denoiser
from core.progress import ProgressBar
from core.records import validate
from core.urls import redacted_config
from data.conditions import ConditionSource
from data.images import Preparation
from data.low_resolution import LOW_RESOLUTION
from data.manifest import LatentSpec, Manifest
from data.plan import identity_of, latent_spec
from data.settings import DataSettings
from data.shards import MappedShards, open_shards
from diffusion.flow import Flow
from diffusion.guidance import Guided
from diffusion.objective import Objective
from diffusion.ode_samplers import require_readable
from diffusion.process import GaussianDiffusion
from diffusion.samplers import Sampler
from evaluation.evaluate import Evaluator, MeasurementProtocol
from evaluation.features.extractor import FeatureExtractor
from evaluation.generate import Generator
from evaluation.reference.reference import make_reference, read_reference
from launch.builders.components import build, build_saved, target_of
from launch.builders.metrics import build_metrics, require_metrics
from launch.builders.normalization import normalized, saved_normalization
from launch.builders.runs import checkpoint_hash, pinned_sources, read_checkpoint
from launch.builders.saved_configs import component, setting
from launch.builders.saved_networks import load_guide, model_of_sources
from launch.builders.text_encoders import encoder_of
from launch.command.settings import EvaluateSettings, SamplingSettings, TrainSettings
from model.autoencoder import Autoencoder
from model.flops import multiply_adds, num_parameters, training_multiply_adds
from model.network import Network
from runtime.protocol import Devices, Processes
from train.checkpoint import read_state_file
from train.ema import MAIN, Averages, initial_share_note
from train.stores import STATE_FILE

CHUNKS = "chunks"  # folder in a run folder with the finished chunks of a killed evaluation
# Settings that evaluations do not record at these values, which earlier versions implied.
_LATER: dict[str, dict[str, Any]] = {"euler": {"shift": 1.0}, "Autoguidance": {"t_min": 0, "t_max": None}}
_REMEDIES = {LOW_RESOLUTION: "set condition.factor to model.upscale"}  # by the part of a condition
_FOR_TEXT = "set the sizes of the text encoder in the model"
_OF_THE_RUN = ("batch_size", "class_dropout", "seed")  # settings that a run's evaluations record


def fill_model(model: Mapping[str, Any], spec: LatentSpec, conditions: ConditionSource) -> dict[str, Any]:
    """Return the model's section with the settings that follow from the data.

    Raises ValueError where the config gives another value.
    """
    filled = dict(model)
    if "outputs_per_channel" in filled:
        raise ValueError("model.outputs_per_channel is given, but the objective determines it; choose diffusion=... .")
    for key, found in _facts_of_data(spec, conditions).items():
        if filled.get(key) not in (None, found):
            raise ValueError(
                f"model.{key} is {filled[key]}, but the shards have {found}; leave model.{key} out, or point "
                "data.shards to other shards."
            )
        filled[key] = found
    return filled


def _facts_of_data(spec: LatentSpec, conditions: ConditionSource) -> dict[str, int]:
    """Return the settings of a model's section that follow from the data."""
    return {"latent_size": spec.latent_size, "channels": spec.channels, "num_classes": conditions.num_classes}


def condition_source(section: Mapping[str, Any], spec: LatentSpec) -> ConditionSource:
    """Return the source of conditions that a config's ``condition`` section describes."""
    source: ConditionSource = build(section)(num_classes=spec.num_classes)
    return source


def expected_spec(data: DataSettings, manifest: Manifest) -> tuple[Autoencoder, LatentSpec]:
    """Return the config's autoencoder, and the spec that shards must have to fit the config."""
    autoencoder: Autoencoder = build(data.autoencoder)
    preparation = build_preparation(data)
    return autoencoder, latent_spec(data.name, manifest.spec.num_classes, autoencoder, preparation, data.flip)


def build_preparation(data: DataSettings) -> Preparation:
    """Return how the images of a config's ``data`` are decoded and cropped."""
    return Preparation(data.image_size, build(data.crop), data.apply_exif)


def build_shards(data: DataSettings) -> MappedShards:
    """Open the shards of the config."""
    return open_shards(data.shards, data.verify_checksums, data.cache, data.cache_bytes)


def require_outputs(model: Network, objective: Objective, of: str) -> None:
    """Raise ValueError where the network of the file ``of`` lacks the output channels that the objective needs."""
    channels = model.latent_shape[0]
    if objective.outputs_per_channel * channels == model.out_channels:
        return
    learned = model.out_channels == 2 * channels
    follow = "set diffusion/variance=learned_range" if learned else "set diffusion/variance=fixed_large or fixed_small"
    if isinstance(objective, Flow):
        follow = f"set diffusion.outputs_per_channel={model.out_channels // channels}"
    elif not isinstance(objective, GaussianDiffusion):
        follow = f"give weights that were trained with diffusion={objective.name}"
    raise ValueError(
        f"The objective needs {objective.outputs_per_channel * channels} output channels, but {of} has "
        f"{model.out_channels}; {follow}."
    )


def require_condition(model: Network, conditions: ConditionSource) -> None:
    """Raise ValueError where the network embeds other parts of a condition than its source makes."""
    x_t, _, embedded = model.example_inputs(1)
    made = conditions.seen(x_t)
    unread = conditions.may_be_unread if embedded else frozenset()
    if not embedded.keys() <= made.keys() or not made.keys() <= embedded.keys() | unread:
        theirs, ours = (", ".join(sorted(parts)) or "nothing" for parts in (embedded, made))
        raise ValueError(
            f"The network {type(model).__name__} embeds {theirs}, but conditions of data/condition have {ours}; choose "
            "the model/embedding of this condition, or another data/condition (low_resolution for an upsampler, text "
            "for captions)."
        )
    for name, value in embedded.items():
        if value.shape[1:] != made[name]:
            raise ValueError(
                f"The network {type(model).__name__} embeds {name} of shape {tuple(value.shape[1:])}, but "
                f"data/condition makes {tuple(made[name])}; {_REMEDIES.get(name, _FOR_TEXT)}."
            )


def model_facts(
    model: Network, objective: Objective, images_seen: int, weights: str, training_seed: int
) -> dict[str, Any]:
    """Return an evaluation record's facts about the network. Compute is in giga multiply-adds, the paper's Gflops."""
    return {
        "weights": weights,
        "training_seed": training_seed,
        "objective": objective.facts(),
        **model.facts(),
        "gmacs": multiply_adds(model) / 1e9,
        "parameters": num_parameters(model),
        "training_gmacs": training_multiply_adds(model, images_seen) / 1e9,
    }


def _named_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component's section as an evaluation record shows it: the component's name, and its settings."""
    name = target_of(section).name
    implied = _LATER.get(name, {}).items()
    own = {key: value for key, value in section.items() if not key.startswith("_") and (key, value) not in implied}
    settings = {"name": name, **own}
    if "guide" in settings:  # the path of a run does not say which checkpoint is its newest
        settings["guide_hash"] = read_checkpoint(settings["guide"], checkpoint_hash)
    shown: dict[str, Any] = redacted_config(settings)
    return shown


def build_generator(
    config: SamplingSettings,
    model: Denoiser,
    objective: Objective,
    autoencoder: Autoencoder,
    spec: LatentSpec,
    conditions: ConditionSource,
    seed: int,
    runtime: Devices,
    class_dropout: float,
) -> Generator:
    """Return a generator of images by a network, with the ``sampler`` and ``guidance`` of a config.

    Raises ValueError for settings that do not fit, before anything is trained or generated.
    """
    sampler: Sampler = build(config.sampler)
    sampler.require(objective)
    require_runtime(sampler, config.runtime, runtime.device)
    needs_null = target_of(config.guidance).needs_null
    if needs_null and not has_condition(conditions, spec):
        raise ValueError(
            "Guidance needs a condition, but this model is trained without one; use diffusion/guidance=none."
        )
    if needs_null and class_dropout == 0:
        raise ValueError(
            "Guidance needs the null class, but this model is trained with class_dropout 0 and never sees it; use "
            "diffusion/guidance=none, or train with class_dropout=0.1."
        )
    section = dict(config.guidance)
    others = {}
    if "guide" in section:
        others["guide"] = runtime.place(load_guide(section.pop("guide"), objective, autoencoder)).eval()
    guided: Guided = build(section)(
        model, null=conditions.null, latent_channels=spec.channels, objective=objective, **others
    )
    return Generator(guided, objective, autoencoder.to(runtime.device), sampler, spec, conditions, seed, runtime)


def has_condition(conditions: ConditionSource, spec: LatentSpec) -> bool:
    """Return whether a network of these conditions gets any."""
    side = spec.latent_size
    return bool(conditions.seen(torch.empty(1, spec.channels, side, side, device="meta")))


def require_runtime(sampler: Sampler, section: Mapping[str, Any], device: torch.device) -> None:
    """Raise ValueError where the runtime needs the same calls in each process, and the sampler decides them."""
    require_readable(sampler, device)
    if sampler.reads_device and section.get("mode") == "fsdp":
        raise ValueError(
            f"sampler {sampler.name} chooses its steps in each process by itself, but with runtime.mode=fsdp all "
            "processes call the network together; use diffusion/sampler=heun_ode."
        )


def build_extractor(section: Mapping[str, Any], runtime: Processes) -> FeatureExtractor:
    """Make, or train, the feature extractor, and move it to the runtime's device."""
    extractor: FeatureExtractor = build(section)
    extractor.to(runtime.device)
    return extractor


def precision_of_products(precision: str, device: torch.device) -> str:
    """Return the network's precision for a record: tf32 where a GPU rounds the factors of float32 products to it."""
    rounds = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if precision == "fp32" and rounds else precision


def build_evaluator(
    config: TrainSettings | EvaluateSettings,
    runtime: Processes,
    progress: ProgressBar,
    conditions: ConditionSource,
    names: Sequence[str] | None = None,
    negative_prompt: str | None = None,
) -> Evaluator:
    """Return the evaluator of a config's ``evaluation``, with the metrics in ``names``, by default the config's.

    It measures images of ``conditions``, whose texts are their captions. Raises ValueError as `require_metrics`.
    """
    settings, data = config.evaluation, config.data
    names = settings.metrics if names is None else names
    require_metrics(settings.metric, names, conditions.texts(conditions.in_turn(1)) is not None)
    of_prompt = {"negative_prompt": negative_prompt} if negative_prompt else {}
    protocol = MeasurementProtocol(
        sampler=_named_settings(config.sampler),
        guidance={**_named_settings(config.guidance), **of_prompt},
        num_images=settings.num_images,
        sampling_seed=settings.seed,
        network_precision=precision_of_products(config.precision.value, runtime.device),
        labels=settings.labels.value,
    )
    captions = conditions.texts(protocol.condition_of(conditions))
    extractor = build_extractor(settings.features, runtime)
    if settings.reference is None:
        source = build(data.source if settings.source is None else settings.source)
        reference = make_reference(source, data.image_size, extractor, build(data.crop), data.apply_exif)
    else:
        reference = read_reference(Path(settings.reference), extractor, Path(settings.cache), progress)
    metrics = build_metrics(settings.metric, names, runtime)
    return Evaluator(extractor, reference, protocol, settings.batch_size, metrics, captions)


class Source(NamedTuple):
    """A checkpoint from which weights were computed, as it was when they were read."""

    step: int
    hash: str


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A trained network, with everything needed to sample from it."""

    path: Path
    run_dir: Path
    step: int
    images_seen: int
    spec: LatentSpec
    conditions: ConditionSource
    model: Network
    objective: Objective
    autoencoder: Autoencoder
    class_dropout: float
    training_seed: int
    hash: str = ""  # of its state file; the folder may have been deleted since
    sources: tuple[Source, ...] = ()  # checkpoints that the weights are computed from
    class_names: tuple[str, ...] = ()  # in the order of the labels, where known
    note: str | None = None  # a remark for users who sample from these weights

    @classmethod
    def load(
        cls, where: str, weights: str, runtime: Devices, text_encoder: Mapping[str, Any] | None = None
    ) -> "LoadedCheckpoint":
        """Load the weights of this name (see `model_at`) of a run's newest checkpoint, or of one checkpoint's folder.

        ``text_encoder`` is the section of the one to use in place of the run's, which may have another path here.
        Raises ValueError for a missing or damaged checkpoint, or one that asks for foreign code.
        """

        def load(path: Path) -> LoadedCheckpoint:
            with pinned_sources(path, weights) as sources:
                return cls._of(sources, weights, runtime, text_encoder)

        found = read_checkpoint(where, load)
        runtime.require_same({"checkpoint": f"{found.path.name} {found.hash}", "its weights": repr(found.sources)})
        return found

    @classmethod
    def _of(
        cls, sources: Sequence[Path], weights: str, runtime: Devices, text_encoder: Mapping[str, Any] | None
    ) -> "LoadedCheckpoint":
        path = sources[-1]
        state, said_by = read_state_file(path), str(path / STATE_FILE)
        config = state["config"]
        spec = validate(LatentSpec, state["spec"], said_by)
        autoencoder: Autoencoder = build_saved(component(config, "data.autoencoder", said_by), said_by)
        _require_autoencoder(path, spec, autoencoder)
        autoencoder = normalized(autoencoder, saved_normalization(config, said_by), said_by)
        objective: Objective = build_saved(component(config, "diffusion", said_by), said_by)
        conditions: ConditionSource = build_saved(component(config, "condition", said_by), said_by)(
            num_classes=spec.num_classes
        )
        section = component(config, "text_encoder", said_by) if config.get("text_encoder") else None
        conditions.prepare(runtime.place, encoder_of(text_encoder or section))
        _require_model_of(spec, conditions, component(config, "model", said_by), said_by)
        batch_size, class_dropout, seed = (setting(config, name, said_by) for name in _OF_THE_RUN)
        model = model_of_sources(sources, weights)
        return cls(
            path=path,
            run_dir=path.resolve().parent.parent,
            step=state["step"],
            images_seen=state["step"] * batch_size,
            spec=spec,
            conditions=conditions,
            model=runtime.place(model).eval(),
            objective=runtime.place(objective),
            autoencoder=autoencoder.to(runtime.device),
            class_dropout=class_dropout,
            training_seed=seed,
            hash=checkpoint_hash(path),
            sources=tuple(Source(int(read_state_file(one)["step"]), checkpoint_hash(one)) for one in sources),
            class_names=tuple(state.get("class_names", [])),
            note=_average_note(config, weights, state["step"], said_by),
        )

    def generator(self, config: SamplingSettings, seed: int, runtime: Devices) -> Generator:
        """Return a generator of images by this checkpoint, with the job's sampler and guidance."""
        return build_generator(
            config,
            self.model,
            self.objective,
            self.autoencoder,
            self.spec,
            self.conditions,
            seed,
            runtime,
            self.class_dropout,
        )


def _require_autoencoder(path: Path, spec: LatentSpec, autoencoder: Autoencoder) -> None:
    """Raise ValueError where the autoencoder's weights are not those that encoded the latents trained on."""
    theirs, ours = spec.made_by, identity_of(autoencoder)
    if theirs != ours:
        raise ValueError(
            f"The checkpoint {path} was trained on latents of the autoencoder {theirs}, but its config now points to "
            f"{ours}; put the former one back."
        )


def _require_model_of(spec: LatentSpec, conditions: ConditionSource, section: Mapping[str, Any], said_by: str) -> None:
    for key, ours in _facts_of_data(spec, conditions).items():
        theirs = section.get(key)
        if theirs != ours:
            raise ValueError(f"{said_by} is not loaded: its model.{key} is {theirs!r}, but its latents have {ours}.")


def _average_note(config: Mapping[str, Any], weights: str, step: int, said_by: str) -> str | None:
    """Return a sentence where the untrained weights still have a large share in an average, else None."""
    if weights != MAIN:
        return None
    averages: Averages = build_saved(component(config, "ema", said_by), said_by)(nn.Linear(1, 1))
    return initial_share_note(averages.by_name[MAIN], MAIN, step)
