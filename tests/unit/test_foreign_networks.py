"""Untrusted networks (TorchScript, DINOv2, Inception) are read safely; damage is named in our own words."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import DAMAGES, flip, within
from inception_weights import random_weights
from safetensors.torch import load_file, save_file
from small_dinov2 import write_small_dinov2
from torch import Tensor

from evaluation.features.dinov2 import DINOv2Features
from evaluation.features.inception import InceptionFeatures, load_inception
from evaluation.features.torchscript import TorchScriptFeatures

SETTINGS: dict[str, Any] = {"image_size": 28, "mean": [0.1, 0.2, 0.3], "std": [0.5, 1.0, 2.0]}
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
ADVICE = ("weights_only", "trust", "add_safe_globals", "\n")  # PyTorch's, and what is no sentence


def refused(make: Callable[[], object], path: Path, words: str) -> None:
    with within(30), pytest.raises(ValueError, match=r".") as raised:
        make()
    sentence = str(raised.value)
    assert words in sentence
    assert str(path) in sentence
    assert not any(advice in sentence for advice in ADVICE)


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self._path}",)


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)
        torch.nn.init.constant_(self.layer.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Flat(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(1, 2, 3))


class Pair(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Whole(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).long()


class Once(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(0, 2, 3))[None]


class Wrong(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(5, 7)


def script(network: torch.nn.Module, path: Path) -> Path:
    torch.jit.script(network).save(str(path))
    return path


def torchscript(path: Path) -> TorchScriptFeatures:
    return TorchScriptFeatures(str(path), "mine", **SETTINGS)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_torchscript_file_damaged_in_any_way_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = script(Linear(), tmp_path / "net.pt")
    if kind == "flipped bit":  # of a weight: the middle may be padding, which nobody reads
        flip(path, 8 * path.read_bytes().index(np.full(3 * 4, 0.5, np.float32).tobytes()) + 3)
    else:
        DAMAGES[kind](path)
    if kind == "longer":  # of an archive the end is looked for
        torchscript(path)
    else:
        refused(lambda: torchscript(path), path, "There is no network" if kind == "missing" else "net.pt")


def test_every_flipped_bit_of_a_torchscript_file_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Flip bits, since PyTorch verifies no checksum of the file."""
    path = script(Linear(), tmp_path / "net.pt")
    whole, expected, refusals = path.read_bytes(), torchscript(path)(IMAGES).vectors, 0
    for bit in range(0, 8 * len(whole), 97):
        path.write_bytes(whole)
        flip(path, bit)
        try:
            np.testing.assert_array_equal(torchscript(path)(IMAGES).vectors, expected)
        except ValueError:
            refusals += 1
    assert refusals > 150


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(f"net/{name.replace('_', '.')}", content)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: torch.save({"a": torch.zeros(2)}, path), "weights without a network, as torch.save writes"),
        (lambda path: torch.save(Runs(path.with_name("ran")), path), "weights without a network"),
        (lambda path: archive(path, readme=b"x"), "it holds something else"),
        (lambda path: archive(path, constants_pkl=b"\x80\x02).", data_pkl=b"\x80\x02).", version=b"3"), "RuntimeError"),
        (
            lambda path: archive(path, constants_pkl=b"", data_pkl=b"", code=b""),
            "not a TorchScript file that this PyTorch",
        ),
    ],
)
def test_an_archive_of_something_else_is_no_torchscript(tmp_path: Path, make: Any, words: str) -> None:
    path = tmp_path / "net.pt"
    make(path)
    refused(lambda: torchscript(path), path, words)
    assert not (tmp_path / "ran").exists()


def test_a_network_with_weights_that_are_not_finite_is_named(tmp_path: Path) -> None:
    network = Linear()
    torch.nn.init.constant_(network.layer.bias, torch.nan)
    path = script(network, tmp_path / "net.pt")
    refused(lambda: torchscript(path), path, "values that are not finite in layer.bias")


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Flat(), "The network of mine gives (3,), but features are [B, D], here of 3 images"),
        (Pair(), "gives a tuple, but features are [B, D]"),
        (Once(), "gives (1, 3), but features are [B, D], here of 3 images"),
        (Whole(), "gives torch.int64, but features are floating-point"),
        (Wrong(), "fails on images [3, 3, 28, 28]"),
    ],
)
def test_a_network_that_gives_no_features_is_named(tmp_path: Path, network: torch.nn.Module, words: str) -> None:
    path = script(network, tmp_path / "net.pt")
    refused(lambda: torchscript(path)(IMAGES), path, words)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_dinov2(tmp_path_factory.mktemp("dinov2"))


def features(folder: Path) -> DINOv2Features:
    return DINOv2Features(str(folder), **SETTINGS)


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "flipped bit"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_dinov2_damaged_in_any_way_is_refused_by_name(dinov2: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Damage each file. A flipped bit in weights is found only by their hash, which every record has."""
    folder = shutil.copytree(dinov2, tmp_path / "copy")
    DAMAGES[kind](folder / name)
    if (name, kind) == ("model.safetensors", "zeros"):
        return  # of a length of 0 that its header would have
    refused(lambda: features(folder), folder / name, "There is no" if kind == "missing" else name)


def changed(folder: Path, **changes: Any) -> Path:
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    left = {key: value for key, value in content.items() if value != "gone"}
    (folder / "config.json").write_text(json.dumps(left))
    return folder / "config.json"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32', but"),
        ({"hidden_size": None}, "hidden_size is None, but"),
        ({"hidden_size": 0}, "hidden_size is 0, but"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, but"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"layer_norm_eps": -1}, "layer_norm_eps is -1, but"),
        ({"hidden_act": "linear"}, "hidden_act is 'linear', but"),
        ({"hidden_act": "gone"}, "it has no hidden_act"),
        ({"model_type": ["x"] * 10**5}, "not of a dinov2"),
    ],
)
def test_a_config_that_cannot_be_a_dinov2s_is_named(
    dinov2: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = shutil.copytree(dinov2, tmp_path / "copy")
    refused(lambda: features(folder), changed(folder, **change), words)


def test_a_config_of_more_weights_than_there_are_is_refused_before_they_are_made(dinov2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dinov2, tmp_path / "copy")
    changed(folder, hidden_size=2**14, num_hidden_layers=60)
    refused(lambda: features(folder), folder / "model.safetensors", "but its config asks for 19")
    changed(folder, hidden_size=32, num_hidden_layers=2, mlp_ratio=3)
    words = "has encoder.layer.0.mlp.fc1.bias of shape [128], but its config asks for [96]"
    refused(lambda: features(folder), folder / "model.safetensors", words)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((32,), torch.nan), "values that are not finite in layernorm.bias"),
        (torch.zeros(32, dtype=torch.int32), "has layernorm.bias of torch.int32, but weights are floating-point"),
        (torch.zeros(32, dtype=torch.bool), "has layernorm.bias of torch.bool"),
    ],
)
def test_weights_of_a_dinov2_that_are_no_finite_numbers_are_named(
    dinov2: Path, tmp_path: Path, value: Tensor, words: str
) -> None:
    folder = shutil.copytree(dinov2, tmp_path / "copy")
    save_file({**load_file(folder / "model.safetensors"), "layernorm.bias": value}, folder / "model.safetensors")
    refused(lambda: features(folder), folder / "model.safetensors", words)


def test_what_else_a_config_says_reaches_no_library(dinov2: Path, tmp_path: Path) -> None:
    """Change settings such as kernels to fetch, code to import, or how weights are packed."""
    folder = shutil.copytree(dinov2, tmp_path / "copy")
    changed(
        folder,
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        _attn_implementation="kernels-community/flash-attn",
        auto_map={"AutoModel": "evil.Evil"},
        dtype="float16",
    )
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    np.testing.assert_array_equal(features(folder)(IMAGES).vectors, features(dinov2)(IMAGES).vectors)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights"))


def state_of(weights: Path, **changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(weights, weights_only=True)
    return {**state, **changes}


@pytest.mark.parametrize("kind", DAMAGES)
def test_inceptions_weights_damaged_in_any_way_are_refused_by_name(weights: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.pth"
    shutil.copy(weights, path)
    DAMAGES[kind](path)
    if kind == "longer":  # of an archive the end is looked for
        load_inception(path)
        return
    words = "There are no Inception weights" if kind == "missing" else "w.pth"
    refused(lambda: InceptionFeatures(str(path), sha256=""), path, words)


def test_older_files_of_weights_are_read_and_refused_where_they_are_cut(weights: Path, tmp_path: Path) -> None:
    """Use the format of the public file, which only its SHA-256 protects."""
    path = tmp_path / "old.pth"
    torch.save(state_of(weights), path, _use_new_zipfile_serialization=False)
    expected = load_inception(weights).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_inception(path).state_dict().items())
    os.truncate(path, path.stat().st_size - 100)
    refused(lambda: load_inception(path), path, "does not hold the Inception weights")


NAME = "fc.bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({NAME: torch.full((1008,), torch.nan)}, "fc.bias in it has values that are not finite"),
        ({NAME: torch.zeros(1008, dtype=torch.complex64)}, "fc.bias in it is torch.complex64, not torch.float32"),
        ({NAME: torch.zeros(1008, dtype=torch.int32)}, "fc.bias in it is torch.int32, not torch.float32"),
        ({NAME: torch.zeros(1008, dtype=torch.bfloat16)}, "fc.bias in it is torch.bfloat16"),
        ({NAME: torch.zeros(1008).to_sparse()}, "fc.bias in it is"),
        ({NAME: 3}, "fc.bias in it is a int"),
        ({NAME: None}, "fc.bias in it is a NoneType"),
        ({"x\n" * 200: 1}, "x x x"),
        ({1: torch.zeros(2)}, "1 in it is a Tensor"),
        ([1, 2], "it holds a list"),
        ("text", "it holds a str"),
        (torch.zeros(3), "it holds a Tensor"),
        ({}, "Missing key(s)"),
    ],
)
def test_weights_of_other_types_or_values_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    torch.save(change, tmp_path / "w.pth")
    refused(lambda: load_inception(tmp_path / "w.pth"), tmp_path / "w.pth", words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({NAME: torch.zeros(1).expand(10**12)}, "size mismatch for fc.bias"),
        ({"more": torch.zeros(1)}, "Unexpected key"),
    ],
)
def test_weights_of_another_network_are_refused(
    weights: Path, tmp_path: Path, change: dict[str, Tensor], words: str
) -> None:
    torch.save(state_of(weights, **change), tmp_path / "w.pth")
    refused(lambda: load_inception(tmp_path / "w.pth"), tmp_path / "w.pth", words)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_file_of_weights_does_not_run(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save({"fc.bias": Runs(tmp_path / "ran")}, path, _use_new_zipfile_serialization=new)
    refused(lambda: load_inception(path), path, "or holds more than tensors")
    assert not (tmp_path / "ran").exists()


def test_a_file_much_larger_than_the_weights_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "w.pth").open("wb") as file:
        file.truncate(2**40)
    path = tmp_path / "w.pth"
    refused(lambda: InceptionFeatures(str(path), sha256=""), path, "bytes, but at most")
