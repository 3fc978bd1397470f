"""``ditscale plan``: compute what a model or a sweep of models costs, before anything is trained."""

import json
import math
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from core.garbage import uncollected
from core.progress import ProgressBar
from data.manifest import FeatureShape, Manifest
from data.shard_tars import array_bytes, shard_bytes_per_sample
from diffusion.objective import LatentFacts
from launch.builders.alignment import fill_alignment, require_tokens
from launch.builders.captions import TextSizes
from launch.builders.components import build, target_of
from launch.builders.objectives import settled
from launch.command.settings import Format, PlanSettings, Precision
from launch.command.words import key_of
from launch.jobs import start
from model.flops import TRAINING_FACTOR, multiply_adds, multiply_adds_of, num_parameters, weightless
from model.memory import STATE_BYTES_PER_PARAMETER, saved_bytes, step_bytes
from model.network import Network
from train.alignment import REPA

COLUMNS = (  # heading, key, format
    ("model", "name", "32s"),
    ("Gflops (GMACs)", "gmacs", "14.3f"),
    ("params M", "parameters_millions", "8.1f"),
    ("train EFLOPs", "training_exaflops", "12.1f"),
    ("hours", "training_hours", "8.1f"),
    ("state GB", "state_gb", "8.2f"),
    ("activations GB", "activations_gb", "14.2f"),
    ("step GB", "step_gb", "7.2f"),
    ("sample TMACs", "sampling_tmacs", "12.2f"),
    ("shards GB", "shards_gb", "9.1f"),
    ("checkpoint GB", "checkpoint_gb", "13.2f"),
    ("save s", "save_sec", "6.1f"),
)
_SAVED = ("weights", "optimizer", "ema")  # parts of the state that a checkpoint has, with one average
STORED_FEATURES = (  # where there are any
    ("features GB", "features_gb", "11.1f"),
    ("embeddings GB", "embeddings_gb", "13.1f"),
)
PROJECTOR = (
    ("projector GMACs", "projector_gmacs", "15.3f"),
    ("its params M", "projector_parameters_millions", "12.1f"),
)

# Of the paper's networks, where neither a model's own config nor data=... or data.shards=... define them.
_USUAL = {"model.latent_size": 32, "model.channels": 4, "model.num_classes": 1000}
# CLIP-L's, where neither the model's own config nor the shards define them.
_USUAL_TEXT = TextSizes(length=77, dim=768, pooled_dim=768)
_NOMINAL = LatentFacts(4096, 1.0)  # costs do not depend on them


def plan_job(config: PlanSettings, progress: ProgressBar) -> None:
    """Print one row; a sweep prints the heading once."""
    with uncollected():  # the meta device imports PyTorch's compiler
        row = plan_row(config)
    if config.format is Format.json:
        print(json.dumps(row))
        return
    columns = [column for column in (*COLUMNS, *STORED_FEATURES, *PROJECTOR) if column[1] in row]
    number = HydraConfig.get().job.get("num")  # type: ignore[attr-defined]  # a DictConfig, whatever its annotation
    if not number:
        print(_assumptions(config, of_several=number is not None))
        print("  ".join(f"{heading:>{_width(layout)}s}" for heading, _, layout in columns))
    print("  ".join(f"{row[key]:>{layout}}" for _, key, layout in columns))
    if not row["fits_grace"]:
        print(
            f"note: a checkpoint of {config.name} takes {row['save_sec']:.0f} s at {config.write_gb_per_sec:g} GB/s, "
            f"longer than grace_sec={config.grace_sec:g}; set checkpoint_every_min in training, which is what a "
            "preemption then costs at most."
        )


def plan_row(config: PlanSettings) -> dict[str, Any]:
    """Return the costs of one model. Gflops and TMACs are multiply-adds as in the paper; EFLOPs are true FLOPs.

    Training has the projector of an alignment; sampling and averages do not.
    """
    outputs = build(settled(config.diffusion, _NOMINAL)).outputs_per_channel
    model: Network = weightless(lambda: build(config.model, outputs_per_channel=outputs))
    macs, parameters = multiply_adds(model), num_parameters(model)
    features = _features(config)
    head = _projector_cost(config, model, features)
    images = config.total_steps * config.batch_size
    training_flops = 2 * TRAINING_FACTOR * (macs + head.macs) * images
    flops_per_second = config.devices * config.peak_tflops * 1e12 * config.utilization
    images_per_device = -(-config.batch_size // config.devices)
    saved = saved_bytes(model, config.precision is Precision.bf16)
    orientations = 2 if config.flip else 1
    values = orientations * 2 * math.prod(model.latent_shape)
    feature_bytes = 0 if features is None else array_bytes(orientations * math.prod(features))
    embedding_bytes = _embedding_bytes(config) if config.text_embeddings else 0
    in_training = {part: parameters + (0 if part == "ema" else head.parameters) for part in STATE_BYTES_PER_PARAMETER}
    state = {part: STATE_BYTES_PER_PARAMETER[part] * count for part, count in in_training.items()}
    return {
        "name": config.name,
        "gmacs": macs / 1e9,
        "parameters_millions": parameters / 1e6,
        "training_exaflops": training_flops / 1e18,
        "training_hours": training_flops / flops_per_second / 3600,
        **{f"{part}_gb": size / 1e9 for part, size in state.items()},
        "state_gb": sum(state.values()) / 1e9,
        "activations_gb": saved.per_image * images_per_device / 1e9,
        "step_gb": step_bytes(saved, images_per_device, parameters + head.parameters) / 1e9,
        "images_per_device": images_per_device,
        "sampling_tmacs": macs * config.sampling_steps / 1e12,
        "checkpoint_gb": (saved_gb := sum(state[part] for part in _SAVED) / 1e9),
        "save_sec": (save_sec := saved_gb / config.write_gb_per_sec),
        "fits_grace": save_sec <= config.grace_sec,
        "shards_gb": (shard_bytes_per_sample(values) + feature_bytes + embedding_bytes) * config.num_samples / 1e9,
        **({} if features is None else {"features_gb": feature_bytes * config.num_samples / 1e9}),
        **({"embeddings_gb": embedding_bytes * config.num_samples / 1e9} if embedding_bytes else {}),
        **head.row(),
    }


def _embedding_bytes(config: PlanSettings) -> int:
    """Return the bytes of a caption's embedding: tokens [M, D] and pooled vector [D] in float16, and the mask [M].

    Raises ValueError where nothing says M and D.
    """
    length, dim = config.text_length, config.text_dim
    if length is None or dim is None:
        raise ValueError(
            "text_embeddings=true needs the size of a caption's embedding, but the network is not conditioned on text; "
            "choose one that is, or give text_length and text_dim."
        )
    return 2 * (length + 1) * dim + length


class _HeadCost(NamedTuple):
    macs: int  # multiply-adds of a forward pass for one image
    parameters: int

    def row(self) -> dict[str, float]:
        if not self.macs:
            return {}
        return {"projector_gmacs": self.macs / 1e9, "projector_parameters_millions": self.parameters / 1e6}


def _features(config: PlanSettings) -> FeatureShape | None:
    """Return the shape of the features that the shards have or that the teacher gives, or None without any."""
    if config.feature_tokens is None or config.feature_dim is None:
        return None
    return FeatureShape(config.feature_tokens, config.feature_dim)


def _projector_cost(config: PlanSettings, model: Network, features: FeatureShape | None) -> _HeadCost:
    """Return what the projector of an alignment costs. Raises ValueError where the features do not fit the network."""
    alignment: REPA | None = build(fill_alignment(config.alignment, features, "this plan"))
    if alignment is None:
        return _HeadCost(0, 0)
    assert features is not None, "fill_alignment refuses a plan without features"
    require_tokens(model, alignment, features)
    projector = weightless(lambda: alignment.projector(model))
    tokens = torch.zeros(1, *model.token_shape(alignment.block), device="meta")
    return _HeadCost(multiply_adds_of(projector, tokens), sum(value.numel() for value in projector.parameters()))


def _assumptions(config: PlanSettings, of_several: bool) -> str:
    """Return a line with the assumptions that the columns do not show. Several models may have several latents."""
    model, name = config.model, config.data.name
    latents = (
        f"{model['latent_size']}x{model['latent_size']}x{model['channels']}{' in the first row' if of_several else ''}"
    )
    classes = f"of {model['num_classes']:,} classes ({name})"
    of_what = classes if config.text_length is None else f"with captions of {config.text_length} tokens"
    machine = f"{config.devices} devices of {config.peak_tflops:g} TFLOPs in {config.precision}"
    return (
        f"For {config.num_samples:,} images {of_what}, latents {latents}, "
        f"{'both orientations' if config.flip else 'one orientation'}; {config.total_steps:,} steps of "
        f"{config.batch_size}; {machine}, at {100 * config.utilization:.0f}% utilization; {config.sampling_steps} "
        f"sampling steps; checkpoints at {config.write_gb_per_sec:g} GB/s, {config.grace_sec:g} s of notice of "
        "preemption. Each of these is a setting of plan."
    )


def settle_by_data(config: DictConfig, words: list[str]) -> None:
    """Take sizes and counts from the shards that the command line gives, or else from the data config it gives.

    Sizes that the model's own config has take precedence over those of a data config. Raises ValueError where they
    differ from those of shards, with which the model cannot be trained.
    """
    keys, text = {key_of(word) for word in words}, _USUAL_TEXT
    if "data.shards" in keys:
        manifest = Manifest.load(config.data.shards)
        spec = manifest.spec
        found: dict[str, Any] = {"num_samples": manifest.num_samples, "flip": spec.flip, "data.name": spec.source}
        found |= {"model.num_classes": spec.num_classes}
        found |= {"model.latent_size": spec.latent_size, "model.channels": spec.channels}
        if manifest.teacher is not None:
            found |= {"feature_tokens": manifest.teacher.tokens, "feature_dim": manifest.teacher.dim}
        if manifest.captions is not None and manifest.captions.tokens is not None:
            encoder = manifest.captions.tokens.encoder
            text = TextSizes(encoder.length, encoder.dim, encoder.pooled_dim)
    elif "data" in keys:
        section = config.data.autoencoder  # a plan does not read its weights
        downscale, channels = planned_latents(section)
        found = {"flip": config.data.flip}
        found |= {"model.latent_size": config.data.image_size // downscale, "model.channels": channels}
    else:
        found = {"data.name": "imagenet"}  # whose numbers are the defaults
    if config.get("teacher") is not None and "data.shards" not in keys:
        shape = target_of(config.teacher).planned(config.teacher.pretrained, config.teacher.image_size)
        found |= {"feature_tokens": shape.tokens, "feature_dim": shape.dim}
    if (text_in_model := _settle_text(config, text)) is not None:
        found |= {"model.num_classes": 0, "text_length": text_in_model.length, "text_dim": text_in_model.dim}
    for key, value in (_USUAL | found).items():
        own = OmegaConf.select(config, key) if key in _USUAL else None
        if own is None and key not in keys:
            OmegaConf.update(config, key, value, force_add=key in _USUAL)
        elif own not in (None, value) and key not in keys and "data.shards" in keys:
            raise ValueError(
                f"{key} is {own}, but the shards have {value}; choose another model, or point data.shards to other "
                "shards."
            )


def _settle_text(config: DictConfig, sizes: TextSizes) -> TextSizes | None:
    """Set the sizes of a text encoder in a model that leaves them open; return those that it has, or None for none."""
    embedding = config.model.get("embedding") or {}
    places = [("model.embedding", name, name, value) for name, value in sizes._asdict().items() if name in embedding]
    if "context_length" in config.model:  # the context of an LDM is a label
        places += [("model", "context_length", "length", sizes.length), ("model", "context_dim", "dim", sizes.dim)]
    found = dict[str, int]()
    for place, name, meaning, value in places:
        section = OmegaConf.select(config, place)
        if section[name] is None:
            OmegaConf.update(config, f"{place}.{name}", value)
        found[meaning] = section[name]
    return sizes._replace(**found) if found else None


def planned_latents(section: DictConfig) -> tuple[int, int]:
    """Return (downscale, channels) of an autoencoder without reading its weights. Raises ValueError if unknown."""
    kind, downscale, channels = target_of(section), section.get("downscale"), section.get("channels")
    if downscale is None or channels is None:
        usual = kind.usual_latents or (getattr(kind, "downscale", None), channels)
        downscale, channels = (usual[0] if downscale is None else downscale, usual[1] if channels is None else channels)
    for name, value in (("downscale", downscale), ("channels", channels)):
        if value is None:
            raise ValueError(f"A plan does not read the weights of data.autoencoder; give data.autoencoder.{name}.")
    return downscale, channels


def _width(layout: str) -> int:
    return int(layout.split(".")[0].rstrip("s"))


if __name__ == "__main__":
    start("plan")
