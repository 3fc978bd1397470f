"""Features of DINOv2 (Oquab et al. 2023), for the FD-DINOv2 that Stein et al. 2023 propose beside FID."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.reading import sha256_of
from evaluation.network_features import NetworkFeatures


class DINOv2Features(NetworkFeatures):
    """The class token after the last norm, of a local ``folder`` with ``config.json`` and ``model.safetensors``.

    Such a folder is a copy of a model's page on the hub, or what ``save_pretrained`` of transformers writes; nothing
    is downloaded. ``hash`` is of both files. Raises ValueError where the folder does not hold a whole DINOv2, or
    transformers is not installed.
    """

    def __init__(
        self,
        folder: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 100,
    ) -> None:
        files = [Path(folder) / name for name in ("config.json", "model.safetensors")]
        _require_dinov2(*files)
        hash_ = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
        backbone = _load(Path(folder))
        shape = backbone.config
        title = f"DINOv2 features (width {shape.hidden_size}, depth {shape.num_hidden_layers})"
        super().__init__(_ClassToken(backbone), title, hash_, image_size, mean, std, batch_size)


class _ClassToken(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        token: Tensor = self.backbone(x).last_hidden_state[:, 0]
        return token


def _require_dinov2(config: Path, weights: Path) -> None:
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(
                f"There is no {path}; copy config.json and model.safetensors of a DINOv2 from its page on the hub "
                "(facebook/dinov2-large) there, or name another folder by evaluation.features.folder=PATH."
            )
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not the JSON of a model ({error}); copy it again.") from error
    if kind != "dinov2":
        raise ValueError(f"{config} is of a {kind}, not of a dinov2; name the folder of a DINOv2.")


def _load(folder: Path) -> Any:
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise ValueError(
            "DINOv2 needs transformers, which is not installed; run `pip install transformers`."
        ) from error
    try:
        both: Any = Dinov2Model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # of many kinds: a damaged file, weights of another shape
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder} holds no DINOv2 that can be read ({reason}); copy its files again.") from error
    backbone, loaded = both
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"model.safetensors of {folder} lacks {len(missing)} of the weights of its config, {missing[0]} among "
            "them; copy both files from one model."
        )
    return backbone
