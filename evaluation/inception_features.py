"""The 2015 Inception as a feature extractor, and where its weights come from."""

import os
import pickle
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from data.reading import sha256_of
from evaluation.features import Features
from evaluation.inception import Inception2015
from model.precision import exact_device, exact_float32

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # 95,628,359 bytes
VARIABLE = "DITSCALE_INCEPTION"


class InceptionFeatures:
    """A `FeatureExtractor`: pool3 features, the 17x17 map of sFID, logits without bias.

    ``weights`` is the checkpoint's path; null takes the one that the environment variable DITSCALE_INCEPTION
    names, or the file under its public name in ``cache``. With ``download`` it is fetched there first. The file
    must have the hash ``sha256`` (a beginning of it is enough). Computes in float32 without TF32 or autocast,
    ``batch_size`` images at once.

    Raises ValueError where there are no weights, or others than expected.
    """

    def __init__(
        self,
        weights: str | None = None,
        cache: str = "cache",
        download: bool = False,
        sha256: str = SHA256,
        batch_size: int = 100,
    ) -> None:
        path = _find_weights(weights, Path(cache), download, sha256)
        self.hash = sha256_of(path)
        if not self.hash.startswith(sha256):
            raise ValueError(
                f"{path} has sha256 {self.hash}, but the Inception weights have {sha256}; fetch {URL} again."
            )
        public = "" if self.hash == SHA256 else f" with other weights, sha256 {self.hash[:8]}"
        self.title = f"2015 Inception features{public}"
        self.facts: dict[str, float] = {}
        self._network = load_inception(path)
        self._device = torch.device("cpu")
        self._batch_size = batch_size

    def to(self, device: torch.device) -> None:
        """Compute there, or on the host where float32 is less than that there."""
        self._device = device = exact_device(device)
        self._network.to(device)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """[B, H, W, C] uint8 of 1 (grey) or 3 channels -> [B, 2048], [B, 2023] and [B, 1008] float32."""
        if images.shape[3] not in (1, 3):
            raise ValueError(
                f"The images have {images.shape[3]} channels, but the Inception network sees 3 (or 1, as grey); "
                "choose another evaluation/features."
            )
        with exact_float32(self._device):
            return Features.concatenate(
                [
                    self._of_batch(images[start : start + self._batch_size])
                    for start in range(0, len(images), self._batch_size)
                ]
            )

    def _of_batch(self, images: NDArray[np.uint8]) -> Features:
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        vectors, spatial, logits = (part.cpu().numpy() for part in self._network(pixels))
        return Features(vectors, None, spatial, logits)


def load_inception(path: Path) -> Inception2015:
    """The network with the parameters in ``path``, for inference. ValueError for a file of something else."""
    network = Inception2015()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, pickle.UnpicklingError, TypeError, AttributeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold the Inception weights ({reason}); fetch {URL} again.") from error
    return network.eval().requires_grad_(False)


def _find_weights(weights: str | None, cache: Path, download: bool, sha256: str) -> Path:
    """Path of an existing file. Raises ValueError that says what to fetch and where to put it."""
    path = Path(weights or os.environ.get(VARIABLE) or cache / FILE_NAME)
    if not path.is_file() and download:
        _download(path, sha256)
    if not path.is_file():
        raise ValueError(
            f"There are no Inception weights at {path}; fetch {URL} (sha256 {sha256[:8]}...) and put it there, or "
            f"name the file by evaluation.features.weights=PATH or {VARIABLE}=PATH, or let "
            "evaluation.features.download=true fetch it, or use evaluation/features=classifier."
        )
    return path


def _download(path: Path, sha256: str) -> None:
    """Fetch the public weights; the file appears only when its hash is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_suffix(".lock")):  # other processes wait for the first
            if not path.is_file():
                torch.hub.download_url_to_file(URL, str(path), hash_prefix=sha256, progress=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{URL} could not be fetched ({error}); fetch it elsewhere and put it at {path}.") from error
