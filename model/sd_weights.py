"""Convert weights from and to Stable Diffusion's program (CompVis/stable-diffusion), bit for bit.

A checkpoint has the U-Net, and where it has them the averages, in the form of latent diffusion's (`model.ldm_weights`).
The text encoder and the autoencoder in it are not read. The weights do not say the number of heads or the size of the
latents. These are arguments.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from model.ldm_weights import load_unet, shape_of_unet, unet_table, usual_size, write_unet
from model.network import Network
from model.unet_names import dimensions_of

if TYPE_CHECKING:
    from model.sd_unet import SDUNet

NAME = "a Stable Diffusion U-Net"
_MIDDLE = "middle_block.1"  # the transformer that every such network has
_CONTEXT, _PROJECTION = f"{_MIDDLE}.transformer_blocks.0.attn2.to_k.weight", f"{_MIDDLE}.proj_in.weight"
_WIDTH = 320  # of all published networks
_PUBLISHED: dict[bool, dict[str, int | None]] = {  # whether transformers have linear maps -> heads
    False: {"num_heads": 8, "head_dim": None},  # version 1
    True: {"num_heads": None, "head_dim": 64},  # version 2
}


def from_sd(
    state_dict: Mapping[str, Tensor],
    num_heads: int | None = None,
    head_dim: int | None = None,
    latent_size: int | None = None,
) -> "SDUNet":
    """Return the network with the weights of a checkpoint's ``state_dict``, of which the U-Net alone is read.

    Its shape is inferred where it can be. None means, for ``num_heads`` and ``head_dim``: 8 heads, or 64 channels of a
    head where transformers have linear maps, as published; for ``latent_size``: 8 at the coarsest level.
    Raises ValueError naming the first three tensors that are missing, unknown or of another shape.
    """
    from model.sd_unet import SDUNet  # imported late, since diffusers takes seconds

    state = unet_table(state_dict)
    shape: dict[str, Any] = {**shape_of_unet(state, NAME), "num_classes": 0}
    shape["context_dim"] = dimensions_of(state, _CONTEXT, 2, NAME)[1]
    shape["linear_projection"] = state[_PROJECTION].dim() == 2 if _PROJECTION in state else False
    shape["latent_size"] = latent_size or usual_size(len(shape["multipliers"]))
    if num_heads is None and head_dim is None:
        shape |= _PUBLISHED[shape["linear_projection"]]
    else:
        shape |= {"num_heads": num_heads, "head_dim": head_dim}
    return load_unet(SDUNet, shape, state, NAME)


def to_sd(network: Network) -> dict[str, Tensor]:
    """Return the weights under the names of a checkpoint. Raises ValueError for a network that it does not have."""
    from model.sd_unet import SDUNet

    if not isinstance(network, SDUNet):
        raise ValueError(
            f"Stable Diffusion's program has only its own U-Net, but the model is of class {type(network).__name__}; "
            "keep it in our format."
        )
    return write_unet(network)


def has_known_heads(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights without prefixes have the width of the published networks, whose heads are known."""
    return bool(shape_of_unet(state, NAME)["width"] == _WIDTH)
