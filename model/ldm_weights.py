"""Convert weights from and to latent diffusion's program (CompVis/latent-diffusion), bit for bit.

The form of a U-Net's tensors is also that of Stable Diffusion's program (`model.sd_weights`).
A checkpoint has the U-Net under ``model.diffusion_model.``, its averages under ``model_ema.`` in names without dots,
and the table of labels under ``cond_stage_model.embedding.weight``; the autoencoder and the rest are not used. The
weights do not say the number of heads or the size of the latents. These are arguments.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from model.flops import weightless
from model.network import Network
from model.released import require_tensors
from model.unet_names import BLOCK, OUTSIDE, RESIDUAL, blocks_of, dimensions_of, levels_of

if TYPE_CHECKING:
    from model.ldm import LDM
    from model.unet import UNet

U = TypeVar("U", bound="UNet")
_NAME = "an LDM"
LABELS = "cond_stage_model.embedding.weight"
_UNET, _AVERAGES = "model.diffusion_model.", "model_ema.diffusion_model."
_FIRST, _LAST = "input_blocks.0.0.weight", "out.2.weight"
_COARSEST = 8  # side of the coarsest level of the published networks
_HEAD_DIM = 32  # of LDM-8
_GROUPS = 32  # of its group norms
_IMAGENETS = 1000  # classes. LDM-8's table has as many rows; LDM-4's has one more, the null class
_PUBLISHED = {  # width and multipliers of LDM-4 and LDM-8 -> their heads
    (192, (1, 2, 3, 5)): {"num_heads": 1, "head_dim": None},
    (256, (1, 2, 4)): {"num_heads": None, "head_dim": _HEAD_DIM},
}
# Our name of a layer in a block -> theirs, by the kind of block, where they differ.
_INSIDE = {"resnets": RESIDUAL, "downsamplers": {"conv": "op"}}


def from_ldm(
    state_dict: Mapping[str, Tensor],
    num_heads: int | None = None,
    head_dim: int | None = None,
    num_classes: int | None = None,
    latent_size: int | None = None,
) -> "LDM":
    """Return an LDM with the weights of a checkpoint's ``state_dict``, whose averages and autoencoder are not read.

    Its shape is inferred where it can be. None means, for ``num_heads`` and ``head_dim``: those of a published network
    of this shape, else heads of 32 channels, or of half the width where that is smaller; for ``num_classes``: see
    `usual_classes`; for ``latent_size``: 8 at the coarsest level.
    Raises ValueError naming the first three tensors that are missing, unknown or of another shape.
    """
    from model.ldm import LDM  # imported late, since diffusers takes seconds

    state = unet_table(state_dict)
    shape = _shape_of(state, num_classes)
    shape["latent_size"] = latent_size or usual_size(len(shape["multipliers"]))
    if num_heads is None and head_dim is None:
        usual = {"num_heads": None, "head_dim": max(1, min(_HEAD_DIM, shape["width"] // 2))}
        shape |= _PUBLISHED.get((shape["width"], shape["multipliers"]), usual)
    else:
        shape |= {"num_heads": num_heads, "head_dim": head_dim}
    return load_unet(LDM, shape, state, _NAME)


def to_ldm(network: Network) -> dict[str, Tensor]:
    """Return the weights under the names of a checkpoint. Raises ValueError for a network that it does not have."""
    from model.ldm import LDM

    if not isinstance(network, LDM):
        raise ValueError(
            f"Latent diffusion's program has only LDM's U-Net, but the model is of class {type(network).__name__}; "
            "keep it in our format."
        )
    return write_unet(network)


def load_unet(kind: type[U], shape: Mapping[str, Any], state: Mapping[str, Tensor], name: str) -> U:
    """Return a U-Net of the class ``kind`` and of a shape, with weights under the program's names without prefixes.

    Raises ValueError, with the network's ``name``, for a shape that the class does not have, and for the first three
    tensors that are missing, unknown or of another shape.
    """
    try:
        config = kind.config_class(**shape)
        expected = weightless(lambda: kind(config))
    except ValueError as error:
        raise ValueError(f"These are not {name}'s weights: {error}") from error
    names = _names(expected)
    require_tensors(state, {names[ours]: tuple(value.shape) for ours, value in expected.state_dict().items()}, name)
    model = kind(config)
    model.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
    return model


def write_unet(network: "UNet") -> dict[str, Tensor]:
    """Return a U-Net's weights under the names of a checkpoint. Raises ValueError for groups that it does not have."""
    if network.config.num_groups != _GROUPS:
        raise ValueError(
            f"Latent diffusion's program has {_GROUPS} groups in each norm, but the model has model.num_groups "
            f"{network.config.num_groups}; keep it in our format."
        )
    state = network.state_dict()
    found = {theirs: state[name].detach().clone() for name, theirs in _names(network).items()}
    return {name if name == LABELS else f"{_UNET}{name}": value for name, value in found.items()}


def restored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors so that the names of each whole table begin with one prefix.

    Averages get the dots of their names back, and both the weights and the averages get the table of labels.
    """
    found, labels = dict(tensors), tensors.get(LABELS)
    names = [name.removeprefix(_UNET) for name in tensors if name.startswith(_UNET)]
    for name in names:
        plain = f"model_ema.{f'diffusion_model.{name}'.replace('.', '')}"
        if plain in found:
            found[f"{_AVERAGES}{name}"] = found.pop(plain)
    if names and labels is not None:
        del found[LABELS]
        prefixes = [prefix for prefix in (_UNET, _AVERAGES) if any(name.startswith(prefix) for name in found)]
        found |= {f"{prefix}{LABELS}": labels for prefix in prefixes}
    return found


def has_transformers(state: Mapping[str, Tensor]) -> bool:
    """Return whether a table without its prefix has the transformers of latent diffusion."""
    return any(".transformer_blocks.0." in name for name in state)


def has_known_heads(state: Mapping[str, Tensor]) -> bool:
    """Return whether the weights have the shape of a published network, whose number of heads is known."""
    levels = levels_of(state, "proj_in.weight", "conv.weight", _NAME)
    return (levels.width, levels.multipliers) in _PUBLISHED


def label_rows(state: Mapping[str, Tensor]) -> int:
    """Return the number of rows of the label table."""
    return dimensions_of(state, LABELS, 2, _NAME)[0]


def usual_classes(rows: int) -> int:
    """Return the classes of a label table of so many rows: all but the last, the null class, unless they are 1,000."""
    return rows if rows in (1, _IMAGENETS) else rows - 1


def unet_table(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the U-Net and the table of labels of a checkpoint, without the prefix."""
    if not any(name.startswith(_UNET) for name in state_dict):
        return dict(state_dict)
    table = {name.removeprefix(_UNET): value for name, value in state_dict.items() if name.startswith(_UNET)}
    return table | ({LABELS: state_dict[LABELS]} if LABELS in state_dict else {})


def _names(network: "UNet") -> dict[str, str]:
    """Return the name that each of our tensors has in the program, without the prefix of the U-Net."""
    blocks = blocks_of(network.config)
    return {name: _their_name(name, blocks) for name in network.state_dict()}


def _their_name(name: str, blocks: Mapping[str, str]) -> str:
    if name.startswith("label_embedding."):
        return LABELS
    path, _, kind = name.removeprefix("unet.").rpartition(".")
    if path in OUTSIDE:
        return f"{OUTSIDE[path]}.{kind}"
    found = BLOCK.fullmatch(path)
    assert found is not None, name
    renamed = _INSIDE.get(found[1].split(".")[-2], {})
    return f"{blocks[found[1]]}.{renamed.get(found[2], found[2])}.{kind}"


def shape_of_unet(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Return the arguments of `UNetConfig` that weights without prefixes determine. Errors have the network's name."""
    channels = dimensions_of(state, _FIRST, 4, name)[1]
    return {
        **levels_of(state, "proj_in.weight", "conv.weight", name)._asdict(),
        "channels": channels,
        "outputs_per_channel": dimensions_of(state, _LAST, 4, name)[0] // max(channels, 1),
    }


def usual_size(levels: int) -> int:
    """Return the side of the latents of the published networks of so many levels."""
    return _COARSEST * 2 ** (levels - 1)


def _shape_of(state: Mapping[str, Tensor], num_classes: int | None) -> dict[str, Any]:
    """Return the arguments of `LDMConfig` that the weights determine, but for the heads."""
    rows, context_dim = dimensions_of(state, LABELS, 2, _NAME)
    classes = usual_classes(rows) if num_classes is None else num_classes
    return {
        **shape_of_unet(state, _NAME),
        "num_classes": classes,
        "null_class": classes == rows - 1,
        "context_dim": context_dim,
    }
