"""Extractors accept any network as a TorchScript file, and DINOv2 from a folder."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_dinov2 import write_small_dinov2

from evaluation.features.dinov2 import DINOv2Features
from evaluation.features.torchscript import TorchScriptFeatures

MEAN, STD = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]


class ChannelMeans(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


def test_a_torchscript_network_sees_normalised_images(tmp_path: Path) -> None:
    torch.jit.script(ChannelMeans()).save(str(tmp_path / "means.pt"))
    extractor = TorchScriptFeatures(str(tmp_path / "means.pt"), "means", 16, MEAN, STD, batch_size=2)
    images = np.full((5, 16, 16, 3), 51, np.uint8)
    found = extractor(images)
    assert found.vectors.shape == (5, 3)
    np.testing.assert_allclose(found.vectors[4], (0.2 - np.array(MEAN)) / STD, rtol=1e-5, atol=1e-6)
    assert extractor(np.full((1, 40, 40, 1), 51, np.uint8)).vectors == pytest.approx(found.vectors[:1], abs=1e-6)
    extractor.to(torch.device("xla", 0))  # it stays on the host, where float32 is float32
    np.testing.assert_array_equal(extractor(images).vectors, found.vectors)


def test_what_a_network_is_fed_belongs_to_its_identity(tmp_path: Path, dinov2: Path) -> None:
    """Reject features and references that were cached for the same file with other settings."""
    torch.jit.script(ChannelMeans()).save(str(tmp_path / "means.pt"))
    network = torch.jit.load(str(tmp_path / "means.pt"))
    network.save(str(tmp_path / "other.pt"), _extra_files={"other": b"bytes"})

    def hash_of(file: str = "means.pt", **changes: Any) -> str:
        settings: dict[str, Any] = {"title": "means", "image_size": 16, "mean": MEAN, "std": STD}
        return TorchScriptFeatures(str(tmp_path / file), **(settings | changes)).hash

    same = hash_of(title="another name", batch_size=3)
    assert hash_of() == same
    others = [hash_of(image_size=17), hash_of(mean=STD), hash_of(std=MEAN), hash_of("other.pt")]
    assert len({same, *others}) == 5
    assert dinov2_of(dinov2).hash != dinov2_of(dinov2, image_size=70).hash


def test_a_missing_or_foreign_torchscript_file_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"title": "x", "image_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}
    with pytest.raises(ValueError, match=r"There is no network at nowhere\.pt"):
        TorchScriptFeatures("nowhere.pt", **settings)
    (tmp_path / "bad.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        TorchScriptFeatures(str(tmp_path / "bad.pt"), **settings)
    torch.jit.script(ChannelMeans()).save(str(tmp_path / "means.pt"))
    with pytest.raises(ValueError, match="has 1 numbers in mean and 3 in std, but needs 3 in each"):
        TorchScriptFeatures(str(tmp_path / "means.pt"), **(settings | {"mean": [0.5]}))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_dinov2(tmp_path_factory.mktemp("dinov2"))


def dinov2_of(folder: Path, **changes: Any) -> DINOv2Features:
    settings: dict[str, Any] = {"image_size": 56, "mean": MEAN, "std": STD}
    return DINOv2Features(str(folder), **settings | changes)


def test_dinov2_of_a_folder_gives_the_class_token_of_images_as_pil_resizes_them(dinov2: Path) -> None:
    from transformers import Dinov2Model

    images = np.random.default_rng(0).integers(0, 256, (5, 90, 90, 3), np.uint8)
    found = dinov2_of(dinov2, batch_size=2)(images).vectors
    resized = [np.asarray(Image.fromarray(image).resize((56, 56), Image.Resampling.BICUBIC)) for image in images]
    normalised = (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / (
        torch.tensor(STD).view(3, 1, 1)
    )
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2)(normalised).pooler_output.numpy()
    assert found.shape == (5, 32)
    # PIL rounds to whole gray levels.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected - expected.mean(axis=0)).max()
    assert dinov2_of(dinov2)(images).vectors == pytest.approx(found, abs=1e-5)


def test_the_hash_of_dinov2_is_of_its_weights_and_config(dinov2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dinov2, tmp_path / "copy")
    assert dinov2_of(folder).hash == dinov2_of(dinov2).hash
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    assert dinov2_of(folder).hash != dinov2_of(dinov2).hash


def test_a_folder_that_holds_no_whole_dinov2_is_refused(dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no .*config.json; copy config.json and model.safetensors"):
        dinov2_of(tmp_path)
    folder = shutil.copytree(dinov2, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    lost = "encoder.layer.1.norm1.weight"
    save_file({name: value for name, value in weights.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"lacks 1 of the weights of its config, {lost}"):
        dinov2_of(folder)
    (folder / "model.safetensors").write_bytes((dinov2 / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not hold a readable DINOv2"):
        dinov2_of(folder)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="is of a vit, not of a dinov2"):
        dinov2_of(folder)
    (folder / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match="is not the JSON of a model"):
        dinov2_of(folder)


def test_dinov2_without_transformers_says_what_to_install(dinov2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="run `pip install transformers`"):
        dinov2_of(dinov2)
