"""Convert weights from and to diffusers' DiT, and write a model as a whole ``DiTPipeline``.

Both programs use the weights in the same way, except for one difference that no weight can undo: frequency i of the
timestep's 128 is 10,000^(-i/128) in the released code and 10,000^(-i/127) in diffusers' DiT
(``downscale_freq_shift=1``). So diffusers' outputs for the released weights differ slightly from the released code's.
`DiT` computes either, by ``frequency_shift``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from model.dit import FIXED_WITHIN, DiT, DiTConfig
from model.network import Network
from model.released import require_depth, require_released_architecture, require_tensors, shapes_only

ANCHOR = "pos_embed.proj.weight"  # the tensor that identifies a state dict with diffusers' names
NULL_CLASS = 1000  # in `DiTPipeline`, whatever the number of classes
PREDICTION_TYPES = {"noise": "epsilon", "v": "v_prediction", "x_0": "sample"}  # ours -> diffusers'
# Processes of 1,000 steps by diffusers' name, first and last beta: the paper's first, then Stable Diffusion's.
_KNOWN_BETAS = (("linear", 1e-4, 2e-2), ("scaled_linear", 8.5e-4, 1.2e-2))
_EMBEDDINGS = {  # ours -> diffusers', where every block has a copy
    "timestep_embedding.input": "timestep_embedder.linear_1",
    "timestep_embedding.output": "timestep_embedder.linear_2",
    "label_embedding": "class_embedder.embedding_table",
}
_OUTER = {
    "patch_embedding": "pos_embed.proj",
    "final_layer.modulation": "proj_out_1",
    "final_layer.decoder": "proj_out_2",
}
# Ours within a block -> diffusers' within a block, which has separate q, k and v.
_BLOCK = {
    "attention.projection": "attn1.to_out.0",
    "mlp.hidden": "ff.net.0.proj",
    "mlp.output": "ff.net.2",
    "modulation": "norm1.linear",
}


class TransformerShape(Protocol):
    """The network's shape, as the config next to diffusers' weights states it."""

    sample_size: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int | None
    num_layers: int
    patch_size: int
    num_embeds_ada_norm: int


def from_diffusers(state: Mapping[str, Tensor], shape: TransformerShape, frequency_shift: int) -> DiT:
    """Return a DiT with diffusers' weights, of the shape that the config next to them states.

    Raises ValueError naming the first three tensors that are missing, unknown or of another shape, and where the
    blocks' embeddings differ, since `DiT` has one for all blocks.
    """
    arguments = _arguments(shape, frequency_shift)
    depth = require_depth(state, r"transformer_blocks\.(\d{1,4})\.")
    if depth != arguments["depth"]:
        raise ValueError(f"The config has {arguments['depth']} layers, but there are weights of {depth}.")
    expected = _as_diffusers(shapes_only(arguments))
    require_tensors(state, {name: tuple(value.shape) for name, value in expected.items()})
    _require_one_embedding(state, depth)
    model = DiT(DiTConfig(**arguments))
    model.load_state_dict({name: _our_tensor(name, state) for name in model.state_dict()})
    return model


def _arguments(config: TransformerShape, frequency_shift: int) -> dict[str, Any]:
    """Return the arguments of `DiTConfig`. Raises ValueError where the config does not describe a DiT."""
    out_channels = config.out_channels or config.in_channels
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"{out_channels} output channels for {config.in_channels} input channels are neither noise alone "
            "nor noise and variance."
        )
    if config.sample_size % config.patch_size:
        raise ValueError(f"patch_size {config.patch_size} does not divide sample_size {config.sample_size}.")
    return {
        "latent_size": config.sample_size,
        "channels": config.in_channels,
        "patch_size": config.patch_size,
        "width": config.num_attention_heads * config.attention_head_dim,
        "depth": config.num_layers,
        "num_heads": config.num_attention_heads,
        "num_classes": config.num_embeds_ada_norm,
        "outputs_per_channel": out_channels // config.in_channels,
        "frequency_shift": frequency_shift,
    }


def to_diffusers(
    network: Network,
    folder: Path,
    autoencoder: Any = None,
    class_names: Sequence[str] = (),
    betas: Sequence[float] | None = None,
) -> None:
    """Write a folder that ``DiTPipeline.from_pretrained`` opens.

    Without an ``autoencoder`` (of diffusers, such as ``AutoencoderKL``) that call needs ``vae=None``, and the pipeline
    denoises but does not decode. ``betas`` are those of the process of the weights; None: the paper's.

    In diffusers, a model with ``frequency_shift`` 1 has the same outputs, and one with 0 has slightly different ones
    (see above). The pipeline's guidance uses class 1000 as the null class, which is right for 1,000 classes only.
    Raises ValueError for a model that diffusers cannot express.
    """
    from diffusers import DiTTransformer2DModel

    model = _require_there(network)
    config = model.config
    theirs: Any = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.width // config.num_heads,
        in_channels=config.channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.latent_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    theirs.load_state_dict({**theirs.state_dict(), **_as_diffusers(model)})  # keeps its own fixed position embedding
    theirs.save_pretrained(Path(folder) / "transformer")
    if autoencoder is not None:
        autoencoder.save_pretrained(Path(folder) / "vae")
    # diffusers itself would write the scheduler's defaults too, and a scheduler made from it by `from_config` would
    # inherit DDIM's timestep_spacing "leading". A new scheduler uses its own default for each absent key.
    write_config(Path(folder) / "scheduler" / "scheduler_config.json", "DDIMScheduler", scheduler_settings(betas))
    parts = {
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": [None, None] if autoencoder is None else ["diffusers", type(autoencoder).__name__],
    }
    names = {"id2label": dict(enumerate(class_names))} if class_names else {}
    write_config(Path(folder) / "model_index.json", "DiTPipeline", {**names, **parts})


def write_config(path: Path, class_name: str, content: Mapping[str, Any]) -> None:
    """Write the JSON by which diffusers builds an object of a class."""
    from diffusers import __version__

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"_class_name": class_name, "_diffusers_version": __version__, **content}
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def scheduler_settings(betas: Sequence[float] | None, prediction: str = "noise") -> dict[str, Any]:
    """Return the process as settings of a diffusers scheduler; None is the paper's, linear over 1,000 steps.

    ``prediction`` is our name of the quantity that the network predicts.
    """
    settings: dict[str, Any] = {"num_train_timesteps": 1000, "clip_sample": False}
    settings["prediction_type"] = PREDICTION_TYPES[prediction]
    for name, start, end in _KNOWN_BETAS:
        if betas is None or _same_betas(betas, name, start, end):
            return settings | {"beta_start": start, "beta_end": end, "beta_schedule": name}
    assert betas is not None
    return settings | {"num_train_timesteps": len(betas), "trained_betas": list(betas)}


def _same_betas(betas: Sequence[float], name: str, start: float, end: float) -> bool:
    power = 2 if name == "scaled_linear" else 1
    named = torch.linspace(start ** (1 / power), end ** (1 / power), 1000, dtype=torch.float64) ** power
    given = torch.tensor(betas, dtype=torch.float64)
    return len(given) == len(named) and torch.allclose(given, named, rtol=1e-9)


def notes_on_pipeline(network: Network) -> list[str]:
    """Return sentences on how the pipeline differs from this program for these weights."""
    model, notes = _require_there(network), []
    if model.config.frequency_shift == 0:
        notes.append("diffusers' DiT spaces the timestep's frequencies differently, so its outputs differ slightly.")
    if (drift := model.position_drift()) > 0:
        notes.append(f"diffusers' DiT uses the fixed position embedding, not this one, which differs by {drift:.2g}.")
    if model.num_classes != NULL_CLASS:
        notes.append(
            f"DiTPipeline uses class {NULL_CLASS} as the null class, which is {model.num_classes} here: give "
            "it guidance_scale=1."
        )
    return notes


def _require_there(network: Network) -> DiT:
    model = require_released_architecture(network)
    if not model.has_null_class:
        raise ValueError(
            f"These weights have no null class, but diffusers' DiT has one after its {model.config.num_classes} "
            "classes; keep them in the released code's format."
        )
    if (drift := model.position_drift()) > FIXED_WITHIN:
        raise ValueError(
            f"The position embedding of these weights was trained: it differs by up to {drift:.3g} from the fixed one, "
            "which diffusers' DiT uses; keep them in the released code's format."
        )
    return model


def _as_diffusers(model: DiT) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        state |= _their_tensors(name, value, model)
    return state


def _require_one_embedding(state: Mapping[str, Tensor], depth: int) -> None:
    for stem in _EMBEDDINGS.values():
        for name in (name for name in state if name.startswith(f"transformer_blocks.0.norm1.emb.{stem}.")):
            for block in range(1, depth):
                other = name.replace(".0.", f".{block}.", 1)
                if not torch.equal(state[name].float(), state[other].float()):
                    raise ValueError(
                        f"{other} differs from {name}, as after training in diffusers, where each block has its own "
                        "embeddings; this program's DiT has one for all blocks."
                    )


def _our_tensor(name: str, state: Mapping[str, Tensor]) -> Tensor:
    """Return one of our tensors, made from diffusers'."""
    stem, leaf = name.rsplit(".", 1)
    if stem in _EMBEDDINGS:  # every block has the same copy
        return state[f"transformer_blocks.0.norm1.emb.{_EMBEDDINGS[stem]}.{leaf}"]
    if stem in _OUTER:
        value = state[f"{_OUTER[stem]}.{leaf}"]
        return value.flatten(1) if name == "patch_embedding.weight" else value
    prefix, inner = _block_of(stem)
    if inner == "attention.qkv":
        return torch.cat([state[f"{prefix}.attn1.to_{part}.{leaf}"] for part in "qkv"])
    return state[f"{prefix}.{_BLOCK[inner]}.{leaf}"]


def _their_tensors(name: str, value: Tensor, model: DiT) -> dict[str, Tensor]:
    """Return diffusers' tensors, made from one of ours; embeddings are repeated in every block."""
    config = model.config
    stem, leaf = name.rsplit(".", 1)
    if stem in _EMBEDDINGS:
        blocks = range(config.depth)
        return {f"transformer_blocks.{block}.norm1.emb.{_EMBEDDINGS[stem]}.{leaf}": value for block in blocks}
    if stem in _OUTER:
        shape = (-1, config.channels, config.patch_size, config.patch_size)
        return {f"{_OUTER[stem]}.{leaf}": value.view(shape) if name == "patch_embedding.weight" else value}
    prefix, inner = _block_of(stem)
    if inner == "attention.qkv":
        return {f"{prefix}.attn1.to_{part}.{leaf}": third for part, third in zip("qkv", value.chunk(3), strict=True)}
    return {f"{prefix}.{_BLOCK[inner]}.{leaf}": value}


def _block_of(stem: str) -> tuple[str, str]:
    """Split the name of a tensor in a block into diffusers' name of the block and our name within the block."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    assert found is not None
    return f"transformer_blocks.{found.group(1)}", found.group(2)
