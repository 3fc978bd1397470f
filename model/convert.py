"""Weights between this program, the released code (facebookresearch/DiT) and diffusers, both ways.

Only adaLN-Zero exists in all three. Weights mean the same everywhere, with one difference that no weight can undo:
frequency i of the timestep's 128 is 10,000^(-i/128) in the released code and 10,000^(-i/127) in diffusers' DiT
(``downscale_freq_shift=1``). So diffusers' outputs for the released weights are a little off the released code's.
`DiT` computes either, by ``frequency_shift``. No file with code in it is ever loaded.
"""

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.attention import SelfAttention
from model.blocks import AdaLNZeroBlock
from model.dit import DiT
from model.flops import constructor_arguments

# Released name -> ours, for everything but the two tensors of other shape (see `_patch_weight`).
_RENAMED = (
    ("x_embedder.proj", "patch_embedding"),
    ("t_embedder.mlp.0", "timestep_embedding.input"),
    ("t_embedder.mlp.2", "timestep_embedding.output"),
    ("y_embedder.embedding_table", "label_embedding"),
    ("attn.qkv", "attention.qkv"),
    ("attn.proj", "attention.projection"),
    ("mlp.fc1", "mlp.hidden"),
    ("mlp.fc2", "mlp.output"),
    ("adaLN_modulation.1", "modulation"),
    ("final_layer.linear", "final_layer.decoder"),
)
# Ours within a block -> diffusers' within a block; q, k and v are apart there.
_DIFFUSERS_BLOCK = (
    ("attention.projection", "attn1.to_out.0"),
    ("mlp.hidden", "ff.net.0.proj"),
    ("mlp.output", "ff.net.2"),
    ("modulation", "norm1.linear"),
)
_HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}  # S, B, L, XL


def load_reference(path: Path) -> dict[str, Tensor]:
    """The released names' tensors of a ``.pt`` file, its EMA where it has one.

    Raises ValueError for a file that is missing, unreadable, or holds anything but tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the released training code stores its arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is refused: it is no file of plain tensors ({reason}).") from error
    state = content.get("ema", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no table of weights; give a .pt of the released code, with or without 'ema'.")
    return state


def from_reference(state_dict: Mapping[str, Tensor], num_heads: int | None = None) -> DiT:
    """A DiT with the released code's weights; its shape is read off them.

    ``num_heads`` cannot be read off: None takes the paper's for its four widths. Raises ValueError that names
    the first three keys that are missing, unknown or of another shape.
    """
    model = DiT(**_shape_of(state_dict, num_heads))
    expected = to_reference(model)
    problems = [f"{name} is missing" for name in expected if name not in state_dict]
    problems += [f"{name} is unknown" for name in state_dict if name not in expected]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)} and not {tuple(expected[name].shape)}"
        for name in expected
        if name in state_dict and state_dict[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"These are not a DiT's weights: {'; '.join(problems[:3])} ({len(problems)} in all).")
    ours = {_our_name(name): value for name, value in state_dict.items() if name != "pos_embed"}
    ours["patch_embedding.weight"] = ours["patch_embedding.weight"].flatten(1)
    model.load_state_dict(ours)
    return model


def to_reference(model: DiT) -> dict[str, Tensor]:
    """The weights under the released names. Raises ValueError for a model that does not exist there.

    The released code has ``frequency_shift`` 0; a model with 1 would have other outputs there.
    """
    _require_released_architecture(model)
    config = model.config
    state = {"pos_embed": model.position_embedding.unsqueeze(0)}
    state |= {_released_name(name): value for name, value in model.state_dict().items()}
    patch = state["x_embedder.proj.weight"]
    state["x_embedder.proj.weight"] = patch.view(-1, config.channels, config.patch_size, config.patch_size)
    return {name: value.detach().clone() for name, value in state.items()}


def from_diffusers(folder: Path, frequency_shift: int = 1) -> DiT:
    """A DiT from a ``DiTPipeline`` folder or its transformer's folder.

    The default computes what diffusers computes; ``frequency_shift`` 0 is right for weights that were trained
    by the released code, such as the published ones. Raises ValueError where there is no safetensors DiT in it.
    """
    from diffusers import DiTTransformer2DModel

    inner = Path(folder) / "transformer"
    try:
        theirs, found = DiTTransformer2DModel.from_pretrained(
            inner if inner.is_dir() else folder, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} holds no diffusers DiT in safetensors ({reason}).") from error
    # diffusers itself fills what is missing with random numbers and goes on.
    problems = [f"{name} is missing" for name in found["missing_keys"]]
    problems += [f"{name} is unknown" for name in found["unexpected_keys"]]
    if problems:
        raise ValueError(f"{folder} has not a DiT's weights: {'; '.join(problems[:3])} ({len(problems)} in all).")
    config = theirs.config
    out_channels = config.out_channels or config.in_channels
    model = DiT(
        latent_size=config.sample_size,
        channels=config.in_channels,
        patch_size=config.patch_size,
        width=config.num_attention_heads * config.attention_head_dim,
        depth=config.num_layers,
        num_heads=config.num_attention_heads,
        num_classes=config.num_embeds_ada_norm,
        learn_sigma=out_channels == 2 * config.in_channels,
        frequency_shift=frequency_shift,
    )
    state = theirs.state_dict()
    model.load_state_dict({name: _from_diffusers_tensor(name, state) for name in model.state_dict()})
    return model


def to_diffusers(model: DiT, folder: Path, autoencoder: Any = None) -> None:
    """Write a folder that diffusers loads: a whole ``DiTPipeline`` with an ``AutoencoderKL``, else its parts.

    A model with ``frequency_shift`` 1 has the same outputs there; for one with 0 the weights are the same and
    the outputs a little off (see above). The pipeline's guidance takes class 1000 for the null class, so it is
    right for 1,000 classes only. Raises ValueError for a model that does not exist there.
    """
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    _require_released_architecture(model)
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
    state = dict(theirs.state_dict())  # its fixed position embedding stays
    for name, value in model.state_dict().items():
        state |= _to_diffusers_tensors(name, value, model)
    theirs.load_state_dict(state)
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False
    )
    if autoencoder is None:
        theirs.save_pretrained(Path(folder) / "transformer")
        scheduler.save_pretrained(Path(folder) / "scheduler")
    else:
        pipeline: Any = DiTPipeline(transformer=theirs, vae=autoencoder, scheduler=scheduler)
        pipeline.save_pretrained(folder)


def replace_label_table(model: DiT, num_classes: int) -> DiT:
    """The same network for another number of classes; only the label table is drawn anew, from the seed 0."""
    renewed = DiT(**{**constructor_arguments(model.config), "num_classes": num_classes})
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("label_embedding.")}
    renewed.load_state_dict(kept, strict=False)
    return renewed


def _shape_of(state: Mapping[str, Tensor], num_heads: int | None) -> dict[str, Any]:
    """DiT's arguments, from the shapes of the released weights."""
    needed = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
    absent = [name for name in needed if name not in state]
    if absent:
        raise ValueError(f"These are not a DiT's weights: {'; '.join(f'{name} is missing' for name in absent[:3])}.")
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    if num_heads is None and width not in _HEADS_OF_WIDTH:
        raise ValueError(f"The number of heads of a model of width {width} is not in its weights; give num_heads.")
    blocks = [re.match(r"blocks\.(\d+)\.", name) for name in state]
    return {
        "latent_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "channels": channels,
        "patch_size": patch_size,
        "width": width,
        "depth": 1 + max((int(found.group(1)) for found in blocks if found), default=0),
        "num_heads": num_heads or _HEADS_OF_WIDTH[width],
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch_size**2,
    }


def _require_released_architecture(model: DiT) -> None:
    first = model.block_list[0]
    if type(first) is not AdaLNZeroBlock or type(first.attention) is not SelfAttention:
        raise ValueError(
            f"Only adaLN-Zero blocks with plain attention exist outside this program, but the model has "
            f"{type(first).__name__} with {type(getattr(first, 'attention', None)).__name__}; keep it in our format."
        )


def _our_name(name: str) -> str:
    for released, ours in _RENAMED:
        name = name.replace(released, ours)
    return name


def _released_name(name: str) -> str:
    for released, ours in _RENAMED:
        name = name.replace(ours, released)
    return name


def _from_diffusers_tensor(name: str, state: Mapping[str, Tensor]) -> Tensor:
    """One of our tensors out of diffusers'."""
    leaf = name.rsplit(".", 1)[1]
    first = "transformer_blocks.0.norm1.emb"  # every block repeats the embeddings; they are one
    outer = {
        "patch_embedding": "pos_embed.proj",
        "timestep_embedding.input": f"{first}.timestep_embedder.linear_1",
        "timestep_embedding.output": f"{first}.timestep_embedder.linear_2",
        "label_embedding": f"{first}.class_embedder.embedding_table",
        "final_layer.modulation": "proj_out_1",
        "final_layer.decoder": "proj_out_2",
    }
    stem = name.removesuffix(f".{leaf}")
    if stem in outer:
        value = state[f"{outer[stem]}.{leaf}"]
        return value.flatten(1) if name == "patch_embedding.weight" else value
    block, inner = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem).groups()  # type: ignore[union-attr]
    prefix = f"transformer_blocks.{block}"
    if inner == "attention.qkv":
        return torch.cat([state[f"{prefix}.attn1.to_{part}.{leaf}"] for part in "qkv"])
    return state[f"{prefix}.{dict(_DIFFUSERS_BLOCK)[inner]}.{leaf}"]


def _to_diffusers_tensors(name: str, value: Tensor, model: DiT) -> dict[str, Tensor]:
    """Diffusers' tensors out of one of ours; embeddings are repeated in every block."""
    config = model.config
    stem, leaf = name.rsplit(".", 1)
    embeddings = {
        "timestep_embedding.input": "timestep_embedder.linear_1",
        "timestep_embedding.output": "timestep_embedder.linear_2",
        "label_embedding": "class_embedder.embedding_table",
    }
    outer = {"final_layer.modulation": "proj_out_1", "final_layer.decoder": "proj_out_2"}
    if stem == "patch_embedding":
        shape = (-1, config.channels, config.patch_size, config.patch_size)
        return {f"pos_embed.proj.{leaf}": value.view(shape) if leaf == "weight" else value}
    if stem in embeddings:
        blocks = range(config.depth)
        return {f"transformer_blocks.{block}.norm1.emb.{embeddings[stem]}.{leaf}": value for block in blocks}
    if stem in outer:
        return {f"{outer[stem]}.{leaf}": value}
    block, inner = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem).groups()  # type: ignore[union-attr]
    prefix = f"transformer_blocks.{block}"
    if inner == "attention.qkv":
        return {f"{prefix}.attn1.to_{part}.{leaf}": third for part, third in zip("qkv", value.chunk(3), strict=True)}
    return {f"{prefix}.{dict(_DIFFUSERS_BLOCK)[inner]}.{leaf}": value}
