"""Compute features of images by a pretrained network, a teacher, with which training aligns another network."""

from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from core.precision import exact_float32
from data.dinov2 import FILES, Shape, load_dinov2, shape_of
from data.manifest import FeatureShape, TeacherSpec

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_PUBLISHED = {"small": 384, "base": 768, "large": 1024, "giant": 1536}  # width of facebook/dinov2-NAME; patches of 14


class Teacher(Protocol):
    """A pretrained network whose features of images are stored."""

    def spec(self) -> TeacherSpec:
        """Return the identity of the teacher and the shape of its features."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Return [B, T, D] float32 of images [B, C, H, W] float32 in [-1, 1], C 1 or 3; tokens go row by row."""
        ...


class DINOv2Teacher:
    """A `Teacher`: the patch tokens after the last norm of a DINOv2, as in REPA (Yu et al. 2024).

    ``pretrained`` is a local folder with ``config.json`` and ``model.safetensors``, or a hub name. Images are
    normalized by ImageNet's mean and deviation and resized bicubically to ``image_size`` pixels. Raises ValueError
    where the network cannot be loaded, or where its patches do not divide ``image_size``.
    """

    name = "dinov2"

    def __init__(self, pretrained: str, image_size: int = 224) -> None:
        loaded = load_dinov2(_folder_of(pretrained), "teacher.pretrained")
        self._tokens = num_tokens(image_size, loaded.patch_size)
        self._backbone = loaded.backbone.eval().requires_grad_(False)
        self._image_size, self._width, self._hash = image_size, loaded.width, loaded.hash
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))

    @staticmethod
    def planned(pretrained: str, image_size: int = 224) -> FeatureShape:
        """Return the shape of the features without reading weights or the hub. Raises ValueError where unknown."""
        if Path(pretrained).is_dir():
            try:
                shape = shape_of(pretrained)
            except FileNotFoundError as error:
                raise ValueError(f"There is no {error.filename}; name a folder of a DINOv2.") from None
        elif (size := pretrained.rpartition("-")[2]) in _PUBLISHED:
            shape = Shape(_PUBLISHED[size], 14)
        else:
            raise ValueError(
                f"teacher.pretrained is {pretrained!r}, whose width is not known; give a local folder, or one of "
                f"{', '.join(f'facebook/dinov2-{name}' for name in _PUBLISHED)}."
            )
        return FeatureShape(num_tokens(image_size, shape.patch_size), shape.width)

    def spec(self) -> TeacherSpec:
        """Return name and hash of the network, the size of its input, and the shape of its features."""
        return TeacherSpec(self.name, f"sha256:{self._hash}", self._image_size, self._tokens, self._width)

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self._backbone.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return [B, T, D] float32 of images [B, C, H, W] float32 in [-1, 1]; gray ones are repeated three times."""
        normalized = ((images.expand(-1, 3, -1, -1) + 1) / 2 - self._mean) / self._std
        resized = F.interpolate(normalized, (self._image_size, self._image_size), mode="bicubic", align_corners=False)
        with exact_float32(images.device):
            tokens: Tensor = self._backbone(resized).last_hidden_state
        return tokens[:, 1:]  # without the class token


def num_tokens(image_size: int, patch_size: int) -> int:
    """Return the number of patches of an image. Raises ValueError where they do not divide it."""
    if image_size < 1 or image_size % patch_size:
        raise ValueError(
            f"teacher.image_size {image_size} is not a multiple of {patch_size}, the teacher's patch size; use "
            f"{max(1, image_size // patch_size) * patch_size}."
        )
    return (image_size // patch_size) ** 2


def _folder_of(pretrained: str) -> Path:
    """Return the local folder of a DINOv2: the folder itself, or that of a hub name in the hub's cache.

    Raises ValueError where the hub, or its cache while offline, does not have the files.
    """
    if Path(pretrained).exists() or pretrained.startswith((".", "/", "~")):
        return Path(pretrained)
    try:
        from transformers.utils import cached_file
    except ImportError as error:
        raise ValueError(
            "DINOv2 needs transformers, which is not installed; run `pip install transformers`."
        ) from error
    try:
        files = [Path(str(cached_file(pretrained, name))) for name in FILES]
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The teacher {pretrained!r} cannot be loaded ({reason}); set teacher.pretrained to a folder with "
            "config.json and model.safetensors of a DINOv2, or to a hub name while online."
        ) from error
    return files[0].parent
