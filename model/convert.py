"""Convert weights from and to other programs, bit for bit: SiT (willisma/SiT) here, others in files of their own.

SiT's network is the released DiT under the same names, so its weights have the same form. They differ in their meaning,
which the objective states (`diffusion.sit`): SiT's network sees t in [0, 1], where 0 is noise and 1 is data, and of its
two outputs per channel the second is not used.
"""

from collections.abc import Mapping

from torch import Tensor

from model.adm_weights import from_adm, to_adm
from model.dit import DiT
from model.ldm_weights import from_ldm, to_ldm
from model.lightningdit import from_lightningdit, to_lightningdit
from model.network import Network
from model.released import from_reference, to_reference
from model.sd_weights import from_sd, to_sd

__all__ = [
    "from_adm",
    "from_ldm",
    "from_lightningdit",
    "from_sd",
    "from_sit",
    "require_sits_frequencies",
    "to_adm",
    "to_ldm",
    "to_lightningdit",
    "to_sd",
    "to_sit",
]


def from_sit(state_dict: Mapping[str, Tensor], num_heads: int | None = None, num_classes: int | None = None) -> DiT:
    """Return a DiT with SiT's weights. It takes SiT's time, and its output has both halves.

    ``num_heads`` and ``num_classes`` as in `from_reference`. Raises ValueError naming the first three tensors that do
    not fit.
    """
    return from_reference(state_dict, num_heads, num_classes)


def to_sit(network: Network) -> dict[str, Tensor]:
    """Return the weights under SiT's names. Raises ValueError for a network that SiT's code does not have."""
    model = require_sits_frequencies(network)
    return to_reference(model)


def require_sits_frequencies(network: Network) -> Network:
    """Return the network. Raises ValueError where its timestep's frequencies are diffusers', which SiT's code lacks."""
    if isinstance(network, DiT) and network.config.frequency_shift:
        raise ValueError(
            f"The model has model.frequency_shift {network.config.frequency_shift}, but SiT's code has 0 only and "
            "would compute other outputs; keep it in our format."
        )
    return network
