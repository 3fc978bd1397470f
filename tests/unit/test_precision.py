"""float32 is exact where it is requested, even if PyTorch was set to a lower precision elsewhere."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from core.precision import exact_float32
from model.autoencoder_kl import DiffusersAutoencoder

CPU = torch.device("cpu")
backends: Any = torch.backends
PARTS = {
    "products on GPUs": backends.cuda.matmul,
    "convolutions on GPUs": backends.cudnn.conv,
    "products on CPUs": backends.mkldnn.matmul,
    "convolutions on CPUs": backends.mkldnn.conv,
}


def settings() -> dict[str, Any]:
    """Return PyTorch's settings of float32 in both of its interfaces; the old one raises where they disagree."""
    found: dict[str, Any] = {name: part.fp32_precision for name, part in PARTS.items()}
    for name, read in (
        ("old: products", torch.get_float32_matmul_precision),
        ("old: products on GPUs", lambda: backends.cuda.matmul.allow_tf32),
        ("old: convolutions", lambda: backends.cudnn.allow_tf32),
        ("cudnn", lambda: backends.cudnn.enabled),
    ):
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "disagrees"
    return found


def old_way(precision: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(precision)
    backends.cudnn.allow_tf32 = convolutions


def new_way() -> None:
    backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "tf32"
    backends.mkldnn.matmul.fp32_precision = backends.mkldnn.conv.fp32_precision = "bf16"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = {name: part.fp32_precision for name, part in PARTS.items()}
    yield
    old_way("highest", True)
    for name, part in PARTS.items():
        part.fp32_precision = before[name]


CALLERS: dict[str, Callable[[], None]] = {
    "fresh": lambda: None,
    "as the runtime": lambda: old_way("high", True),
    "medium": lambda: old_way("medium", True),
    "exact already": lambda: old_way("highest", False),
    "new way": new_way,
}


@pytest.mark.parametrize("caller", CALLERS)
def test_nothing_inexact_is_left_in_the_block_and_all_is_put_back(caller: str) -> None:
    CALLERS[caller]()
    before = settings()
    with torch.autocast("cpu", torch.bfloat16), exact_float32(CPU):
        inside = settings()
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert {inside[name] for name in PARTS} == {"ieee"}
    assert inside["old: products on GPUs"] is False  # cuBLAS's kernels ask so, and raise where the two ways disagree
    assert inside["old: products"] == "highest"
    assert inside["cudnn"] is True
    assert product.dtype == torch.float32
    assert settings() == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_autoencoder_in_float32_is_exact_and_keeps_cudnn(tmp_path: Path, precision: Any) -> None:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path)
    autoencoder = DiffusersAutoencoder("small", str(tmp_path), 1.0, precision=precision)
    seen: list[dict[str, Any]] = []
    for part in (autoencoder._network.encoder, autoencoder._network.decoder):
        part.register_forward_hook(lambda *_: seen.append(settings()))
    old_way("high", True)
    moments = autoencoder.moments(torch.zeros(1, 3, 8, 8))
    autoencoder.decode(moments[:, :4])
    expected = "ieee" if precision == "fp32" else "tf32"
    assert [(found["products on GPUs"], found["convolutions on GPUs"]) for found in seen] == [(expected, expected)] * 2
    assert all(found["cudnn"] for found in seen)
