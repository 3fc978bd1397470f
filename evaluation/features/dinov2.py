"""Compute features of DINOv2 (Oquab et al. 2023), for the FD-DINOv2 that Stein et al. 2023 propose besides FID."""

from collections.abc import Sequence

from torch import Tensor, nn

from data.dinov2 import load_dinov2
from evaluation.features.network import NetworkFeatures


class DINOv2Features(NetworkFeatures):
    """A `FeatureExtractor`: the class token after the last norm of the DINOv2 in a local ``folder``.

    The folder has ``config.json`` and ``model.safetensors``, copied from a model's page on the hub or written by
    ``save_pretrained`` of transformers; nothing is downloaded. ``hash`` depends on both files. Raises ValueError where
    the folder does not hold a whole DINOv2, or transformers is not installed.
    """

    def __init__(
        self,
        folder: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 100,
    ) -> None:
        loaded = load_dinov2(folder, "evaluation.features.folder")
        title = f"DINOv2 features (width {loaded.width}, depth {loaded.depth})"
        super().__init__(_ClassToken(loaded.backbone), title, loaded.hash, image_size, mean, std, batch_size, folder)


class _ClassToken(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        token: Tensor = self.backbone(x).last_hidden_state[:, 0]
        return token
