"""Compute features with any network that was saved as TorchScript, such as a classifier of one's own data.

A TorchScript file holds network and weights together and needs no library of models here. Loading it runs no Python
(``torch.export`` archives and plain ``torch.load`` unpickle), but computing features runs the program in it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from core.archives import members_of, opened, require_sound
from core.reading import DamagedFileError, sha256_of
from evaluation.features.network import NetworkFeatures

_MOST_BYTES = 2**36  # of all members together
_PROGRAM, _TENSORS = "constants.pkl", "data.pkl"  # torch.jit.save writes both; torch.save writes only the second


class TorchScriptFeatures(NetworkFeatures):
    """A `FeatureExtractor` with the network in ``file``.

    Raises ValueError where the file is missing, damaged or not a TorchScript file.
    """

    def __init__(
        self,
        file: str,
        title: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 100,
    ) -> None:
        path = Path(file)
        try:
            _require_program(path)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"There is no network at {path}; save one there by torch.jit.save (docs/evaluation.md says how), or "
                "name it by evaluation.features.file=PATH."
            ) from None
        network = _load(path)
        super().__init__(network, title, sha256_of(path), image_size, mean, std, batch_size, str(path))


def _require_program(path: Path) -> None:
    """Raise the OSErrors of `open`, and ValueError for a file that is damaged or not a TorchScript file.

    PyTorch itself does not check the checksums of the files that it loads.
    """
    with opened(
        path, lambda what: f"{path} is not a TorchScript file ({what}); save the network by torch.jit.save."
    ) as archive:
        names = [name.partition("/")[2] for name in members_of(archive, path, plain_names=False)]
        if _PROGRAM not in names:
            what = "weights without a network, as torch.save writes" if _TENSORS in names else "something else"
            raise DamagedFileError(
                f"{path} is not a TorchScript file (it holds {what}); save the network by torch.jit.save."
            )
        require_sound(archive, path, _MOST_BYTES)


def _load(path: Path) -> nn.Module:
    """Return the network. Raises ValueError where PyTorch cannot load it or its values are not finite."""
    try:
        network: nn.Module = torch.jit.load(path, map_location="cpu")
    except Exception as error:  # of many types
        raise ValueError(
            f"{path} is not a TorchScript file that this PyTorch loads ({type(error).__name__}); save the network by "
            "torch.jit.save again."
        ) from None
    for name, value in network.named_parameters():
        if not value.isfinite().all():
            raise ValueError(f"{path} has values that are not finite in {name}; save a network that has not diverged.")
    return network
