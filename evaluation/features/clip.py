"""Compare images with their captions by the embeddings of CLIP (Radford et al. 2021)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from core.precision import exact_device, exact_float32
from core.records import canonical_hash
from data.text_encoders import token_ids
from evaluation.features.clip_folder import Preparation, load_clip


class CLIPSimilarity:
    """A `CaptionScorer`: the cosine between CLIP's embeddings of an image and of ``prefix`` + its caption.

    ``folder`` and ``tokenizer`` are as `load_clip` takes them; ``setting`` names the metric's section in errors.
    Computes in float32, ``batch_size`` images at once.
    """

    def __init__(self, folder: str, tokenizer: str | None, prefix: str, batch_size: int, setting: str) -> None:
        self._clip = load_clip(folder, tokenizer, setting)
        self._prefix, self._batch_size, self._device = prefix, batch_size, torch.device("cpu")
        self.title = Path(folder).resolve().name
        self.weights_sha256, self.clip_hash = self._clip.weights_sha256, self._clip.hash
        self.hash = canonical_hash([self.clip_hash, prefix], spaced=True)

    def to(self, device: torch.device) -> None:
        """Use this device, or the CPU where the device does not compute true float32."""
        self._device = exact_device(device)
        self._clip.network.to(self._device)

    def __call__(self, images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float32]:
        """Return [B, 2] of images [B, H, W, C] uint8, C 1 or 3: the cosine, and 1 for a truncated caption.

        Raises ValueError for images of other channels, or where a cosine is not finite.
        """
        if images.shape[3] not in (1, 3):
            raise ValueError(
                f"The images have {images.shape[3]} channels, but {self.title} sees 3 (or 1, as gray); leave "
                "its metric out."
            )
        ids, _, truncated = token_ids(
            self._clip.tokenizer, [self._prefix + caption for caption in captions], self._clip.length
        )
        cosines = np.empty(len(images), np.float32)
        for start in range(0, len(images), self._batch_size):
            part = slice(start, start + self._batch_size)
            cosines[part] = self._cosines(prepared(images[part], self._clip.preparation), ids[part])
        if not np.isfinite(cosines).all():
            raise ValueError(f"{self.title} gives cosines that are not finite; use weights that do not overflow.")
        return np.stack([cosines, truncated.astype(np.float32)], axis=1)

    @torch.no_grad()
    def _cosines(self, pixels: Tensor, ids: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the cosines [B] float64 of prepared images [B, 3, s, s] and token ids [B, M].

        No mask is needed: the text encoder is causal, and the embedding is that of the caption's end.
        """
        clip = self._clip.network
        with exact_float32(self._device):
            text = clip.text_model(input_ids=torch.from_numpy(ids).long().to(self._device)).pooler_output
            image = clip.vision_model(pixel_values=pixels.to(self._device)).pooler_output
            one, other = clip.visual_projection(image), clip.text_projection(text)
        found: NDArray[np.float64] = F.cosine_similarity(one.cpu().double(), other.cpu().double(), dim=1).numpy()
        return found


def prepared(images: NDArray[np.uint8], preparation: Preparation) -> Tensor:
    """Return images [B, H, W, C] uint8, C 1 or 3, as CLIP's inputs [B, 3, s, s] float32, s the size of the crop.

    PIL resizes them bicubically and rounds to whole levels, as in CLIP's own program.
    """
    height, width = images.shape[1:3]
    side, crop = preparation.shortest_side, preparation.crop_size
    shortest = min(height, width)
    rows, columns = side * height // shortest, side * width // shortest
    top, left = (rows - crop) // 2, (columns - crop) // 2
    inputs = np.empty((len(images), 3, crop, crop), np.float32)
    for image, row in zip(images, inputs, strict=True):
        gray_or_color = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        resized = np.asarray(gray_or_color.convert("RGB").resize((columns, rows), Image.Resampling.BICUBIC))
        row[:] = resized[top : top + crop, left : left + crop].transpose(2, 0, 1)
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (preparation.mean, preparation.std))
    return torch.from_numpy((inputs / np.float32(255) - mean) / std)
