"""Compute features with the 2015 Inception, and find or download its weights."""

import io
import os
import warnings
from hashlib import sha256 as sha256_hash
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.archives import opened, require_sound
from core.locks import locked
from core.precision import exact_device, exact_float32
from core.reading import read_regular, require_regular
from evaluation.features.extractor import Features
from evaluation.features.inception_network import Inception2015

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # 95,628,359 bytes
VARIABLE = "DITSCALE_INCEPTION"
_MOST_BYTES = 2**28  # of a file with the weights of this network
_ZIP = b"PK"  # first bytes of files of torch.save, except old ones such as the public file


class InceptionFeatures:
    """A `FeatureExtractor` with pool3 features, the 17x17 map of sFID, and logits without bias.

    ``weights`` is the checkpoint's path; null uses the path in the environment variable DITSCALE_INCEPTION, or the
    file with the public name in ``cache``. With ``download``, a missing file is fetched first. The file must have the
    hash ``sha256``, of which a prefix is enough. Computes in float32 without TF32 or autocast, ``batch_size`` images at
    once.

    Raises ValueError where there are no weights, or where they have another hash.
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
        content = read_regular(path, _MOST_BYTES)
        self.hash = sha256_hash(content).hexdigest()
        if not self.hash.startswith(sha256):
            raise ValueError(
                f"{path} has sha256 {self.hash}, but the Inception weights have {sha256}; fetch {URL} again."
            )
        public = "" if self.hash == SHA256 else f" with other weights, sha256 {self.hash[:8]}"
        self.title = f"2015 Inception features{public}"
        self.facts: dict[str, float] = {}
        self._network = load_inception(path, content)
        self._device = torch.device("cpu")
        self._batch_size = batch_size

    def to(self, device: torch.device) -> None:
        """Use this device, or the CPU where the device does not compute true float32."""
        self._device = device = exact_device(device)
        self._network.to(device)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Map images [B, H, W, C] uint8, C 1 (gray) or 3, to [B, 2048], [B, 2023] and [B, 1008] float32."""
        if images.shape[3] not in (1, 3):
            raise ValueError(
                f"The images have {images.shape[3]} channels, but the Inception network sees 3 (or 1, as gray); "
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


def load_inception(path: Path, content: bytes | None = None) -> Inception2015:
    """Return the network with the parameters in ``path``, for inference.

    ``content`` is that of the file, if it was read already. Raises ValueError for a file with other content.
    """
    content = read_regular(path, _MOST_BYTES) if content is None else content
    if content.startswith(_ZIP):  # PyTorch itself does not check the checksums
        with opened(path, lambda what: _not_the_weights(path, what)) as archive:
            require_sound(archive, path, _MOST_BYTES)
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, with messages that advise to trust the file
        what = f"{type(error).__name__} in its {len(content)} bytes; it is damaged, or holds more than tensors"
        raise ValueError(_not_the_weights(path, what)) from None
    network = Inception2015()
    _require_same(state, network.state_dict(), path)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(_not_the_weights(path, " ".join(str(error).split())[:200])) from None
    return network.eval().requires_grad_(False)


def _require_same(state: Any, ours: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError where a file holds anything but finite tensors of the network's dtypes."""
    if not isinstance(state, dict):
        raise ValueError(_not_the_weights(path, f"it holds a {type(state).__name__}"))
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"{' '.join(str(name).split())[:80]} in it is a {type(value).__name__}"
            raise ValueError(_not_the_weights(path, what))
        expected = ours.get(name)
        if expected is not None and (value.layout != torch.strided or value.dtype != expected.dtype):
            raise ValueError(_not_the_weights(path, f"{name} in it is {value.dtype}, not {expected.dtype}"))
        if expected is not None and value.shape == expected.shape and not value.isfinite().all():
            raise ValueError(_not_the_weights(path, f"{name} in it has values that are not finite"))


def _not_the_weights(path: Path, what: str) -> str:
    return f"{path} does not hold the Inception weights ({what}); fetch {URL} again."


def _find_weights(weights: str | None, cache: Path, download: bool, sha256: str) -> Path:
    """Return the path of an existing file. Raises ValueError that says what to fetch and where to put it if missing."""
    path = Path(weights or os.environ.get(VARIABLE) or cache / FILE_NAME)
    if not path.exists() and download:
        _download(path, sha256)
    try:
        require_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        or_so = "" if weights else f" or {VARIABLE}=PATH"  # which a setting beats
        raise ValueError(
            f"There are no Inception weights at {path}; fetch {URL} (sha256 {sha256[:8]}...) and put it there, or "
            f"name the file by evaluation.features.weights=PATH{or_so}, or let "
            "evaluation.features.download=true fetch it, or use evaluation/features=classifier."
        ) from None
    return path


def _download(path: Path, sha256: str) -> None:
    """Download the public weights; the file appears only after its hash is verified."""
    try:
        with locked(path.with_suffix(".lock")):  # other processes wait for the first one
            if not path.exists():
                torch.hub.download_url_to_file(URL, str(path), hash_prefix=sha256, progress=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{URL} could not be fetched ({error}); fetch it elsewhere and put it at {path}.") from error
