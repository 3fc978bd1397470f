"""Features of any network that was saved as TorchScript: a classifier's of one's own data, for example.

TorchScript, because such a file holds network and weights together and needs no library of models here, and because
loading it runs no Python: ``torch.export`` archives and plain ``torch.load`` unpickle.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from data.reading import sha256_of
from evaluation.network_features import NetworkFeatures


class TorchScriptFeatures(NetworkFeatures):
    """Of ``file``. Raises ValueError where the file is missing or no TorchScript."""

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
        if not path.is_file():
            raise ValueError(
                f"There is no network at {path}; save one there by torch.jit.save (docs/evaluation.md says how), or "
                "name it by evaluation.features.file=PATH."
            )
        try:
            network = torch.jit.load(path, map_location="cpu")
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is no TorchScript ({reason}); save the network by torch.jit.save.") from error
        super().__init__(network, title, sha256_of(path), image_size, mean, std, batch_size)
