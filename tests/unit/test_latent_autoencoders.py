"""Autoencoders without a posterior, of each class of diffusers, give diffusers' numbers and go through every job."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess
from diffusers import AutoencoderDC, AutoencoderTiny, DiTPipeline, VQModel
from omegaconf import OmegaConf
from pictures import make_autoencoder, make_dc, make_image_folder, make_tiny, make_vq, photo
from torch import Tensor

from core.records import validate
from data.images import CenterCrop, Preparation, to_unit_range
from data.manifest import LatentSpec, Manifest
from data.plan import latent_spec
from data.shards import MappedShards
from launch.builders.build import LoadedCheckpoint
from launch.command.app import CONF
from launch.encode import require_own_scale
from launch.plan import planned_latents
from model.autoencoder_folder import FolderAutoencoder
from model.autoencoder_kl import DiffusersAutoencoder
from model.autoencoder_latents import DCAutoencoder, TinyAutoencoder, VQAutoencoder
from runtime.accelerate import AccelerateRuntime

KINDS: dict[str, tuple[Callable[[Path], Path], type[FolderAutoencoder], Any, str, tuple[int, int]]] = {
    "vq": (make_vq, VQAutoencoder, VQModel, "latents", (2, 3)),
    "dc": (make_dc, DCAutoencoder, AutoencoderDC, "latent", (32, 32)),
    "tiny": (make_tiny, TinyAutoencoder, AutoencoderTiny, "latents", (4, 16)),
}


def images(count: int = 2, size: int = 32) -> Tensor:
    return to_unit_range(np.stack([CenterCrop()(photo(number), size) for number in range(count)]))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, KINDS[request.param][0](tmp_path_factory.mktemp(request.param) / "weights")


@torch.no_grad()
def test_latents_and_images_of_each_class_are_those_of_diffusers_and_nothing_is_drawn(kind: tuple[str, Path]) -> None:
    name, folder = kind
    _, ours_class, theirs_class, attribute, (downscale, channels) = KINDS[name]
    ours, theirs = ours_class("x", str(folder), 0.5, 0.25), theirs_class.from_pretrained(folder)
    assert (ours.downscale, ours.channels, ours.image_channels) == (downscale, channels, 3)
    latent = getattr(theirs.encode(images()), attribute)
    moments = ours.moments(images())
    assert (moments.shape, moments.dtype) == ((2, 2 * channels, 32 // downscale, 32 // downscale), torch.float32)
    torch.testing.assert_close(moments[:, :channels], latent, rtol=1e-5, atol=1e-5)
    noise = torch.randn(latent.shape)
    drawn = ours.draw(moments, noise)
    torch.testing.assert_close(drawn, (latent - 0.25) * 0.5)
    assert ours.draw(moments.half(), noise, out=noise) is noise
    torch.testing.assert_close(noise, drawn, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(ours.decode(drawn), theirs.decode(latent).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_class_runs_in_bf16_and_has_the_revision_of_its_weights(kind: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = kind
    make, ours_class, *_ = KINDS[name]
    exact, coarse = (ours_class("x", str(folder), precision=precision) for precision in ("fp32", "bf16"))
    moved = ours_class("x", str(make(tmp_path / "moved")))
    assert exact.revision == coarse.revision == moved.revision
    one, other = (ours.moments(images())[:, : ours.channels] for ours in (exact, coarse))
    assert other.dtype == torch.float32
    assert 0 < (one - other).abs().max() < 0.2 * one.abs().max()
    assert coarse.decode(one).dtype == torch.float32


@pytest.mark.parametrize("norm_type", ["group", "spatial"])
@torch.no_grad()
def test_latents_are_quantized_when_they_are_decoded_and_not_before(norm_type: str, tmp_path: Path) -> None:
    folder = make_vq(tmp_path / "x", norm_type=norm_type)
    ours, theirs = VQAutoencoder("x", str(folder), 1.0), VQModel.from_pretrained(folder)
    codes = theirs.quantize.embedding.weight
    stored = ours.moments(images())[:, :3]
    latent = torch.randn(2, 3, 16, 16)
    expected = codes[torch.cdist(latent.permute(0, 2, 3, 1).reshape(-1, 3), codes).argmin(1)].view(2, 16, 16, 3)
    quantized = ours._quantized(latent)
    assert torch.equal(quantized, expected.permute(0, 3, 1, 2))
    assert not torch.equal(stored, ours._quantized(stored))
    torch.testing.assert_close(ours.decode(latent), theirs.decode(latent).sample, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.decode(latent), ours.decode(quantized))
    assert torch.equal(VQAutoencoder("x", str(folder), precision="bf16")._quantized(latent), quantized)


def test_a_deep_compression_autoencoder_may_have_128_channels(tmp_path: Path) -> None:
    dc = DCAutoencoder("x", str(make_dc(tmp_path / "dc", channels=128)))
    moments = dc.moments(images(1, 64))
    assert (dc.channels, dc.downscale, moments.shape) == (128, 32, (1, 256, 2, 2))
    assert dc.decode(dc.draw(moments, torch.zeros(1, 128, 2, 2))).shape == (1, 3, 64, 64)


def test_scale_and_shift_are_those_of_the_folder_where_none_are_given(tmp_path: Path) -> None:
    dc = DCAutoencoder("x", str(make_dc(tmp_path / "dc", scale=0.25)))
    assert (dc.scale, dc.shift, dc.own_scale, dc.own_shift) == (0.25, 0.0, 0.25, None)
    folder = make_autoencoder(tmp_path / "kl")
    config = json.loads((folder / "config.json").read_text())
    config |= {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 5.0]}
    (folder / "config.json").write_text(json.dumps(config))
    kl = DiffusersAutoencoder("x", str(folder))
    assert (kl.scale, kl.shift) == ([0.5, 0.25, 0.125, 0.1], [1.0, 2.0, 3.0, 4.0])
    spec = latent_spec("animals", 3, kl, Preparation(32, CenterCrop()), flip=False)
    assert (spec.scale, spec.shift) == (kl.scale, kl.shift)
    assert validate(LatentSpec, json.loads(json.dumps(asdict(spec))), "a manifest") == spec
    latent = torch.zeros(1, 4, 4, 4)
    unscaled = DiffusersAutoencoder("x", str(folder), 1.0, 0.0)
    torch.testing.assert_close(
        kl.decode(latent), unscaled.decode(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1).expand(1, 4, 4, 4))
    )
    with pytest.raises(ValueError, match=r"says scaling_factor \[0.5,0.25,0.125,0.1\] in its config.json, but data"):
        require_own_scale(unscaled, [])
    require_own_scale(unscaled, ["data.autoencoder.scale=1.0", "data.autoencoder.shift=0.0"])
    stated = VQAutoencoder("x", str(make_vq(tmp_path / "vq")), 1.0)
    with pytest.raises(ValueError, match=r"says scaling_factor 0.18215 in its config.json, but data"):
        require_own_scale(stated, [])


@pytest.mark.parametrize(
    ("change", "settings", "expected"),
    [
        (
            {"_class_name": "AutoencoderDC"},
            {},
            r"is a AutoencoderDC, but .* reads a VQModel; choose model/autoencoder=",
        ),
        (
            {"_class_name": "AutoencoderOobleck"},
            {},
            "is a AutoencoderOobleck, but .* the classes that are read are Auto",
        ),
        (
            {"_class_name": 3},
            {},
            "is a 3, but .* reads a VQModel; the classes that are read are AutoencoderKL, VQModel",
        ),
        ({"block_out_channels": "x"}, {}, "cannot be loaded"),
        ({"block_out_channels": [8]}, {}, "cannot be loaded"),
        ({"latent_channels": 4}, {}, "cannot be loaded"),
        ({"norm_num_groups": 3}, {}, "cannot be loaded"),
        ({"scaling_factor": "much"}, {}, "has a scaling_factor, shift_factor, latents_mean or latents_std that is not"),
        ({"scaling_factor": 0}, {}, "data.autoencoder.scale is 0, by which latents cannot be divided"),
        (
            {"latents_mean": [1.0], "latents_std": [1.0, 2.0]},
            {},
            "1 numbers in latents_mean and 2 in latents_std, but 3",
        ),
        ({"latents_mean": [1.0] * 3, "latents_std": [0.0] * 3}, {}, "latents_std that is not made of finite numbers"),
        (
            {},
            {"downscale": 4},
            "has downscale 2, but data.autoencoder.downscale is 4; set data.autoencoder.downscale=2",
        ),
        ({}, {"channels": 4}, "has channels 3, but data.autoencoder.channels is 4; set data.autoencoder.channels=3"),
        ({}, {"scale": [1.0, 2.0]}, "scale has 2 values, but the autoencoder has 3 channels"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_sentence(
    change: dict[str, Any], settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    folder = make_vq(tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=expected):
        VQAutoencoder("x", str(folder), **settings)


def test_a_folder_without_some_tensors_is_refused_where_diffusers_would_draw_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = make_vq(tmp_path / "x") / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "quantize" not in name}, path)
    with pytest.raises(
        ValueError, match=r"cannot be loaded \(1 tensors are missing, such as quantize.embedding.weight"
    ):
        VQAutoencoder("x", str(tmp_path / "x"))


def test_vq_latents_are_encoded_trained_on_sampled_and_exported(tmp_path: Path, in_process: InProcess) -> None:
    make_image_folder(tmp_path / "images", per_class=8)
    folder = make_vq(tmp_path / "vq")
    data = ["data=folder", "data.name=animals", "data.source.root=images", "data.image_size=16", "data.shards=shards"]
    words = ["model/autoencoder=vq_f4", "data.autoencoder.pretrained=vq", "data.autoencoder.subfolder=null"]
    shown = in_process("encode", *data, *words, expect=2)
    assert "has downscale 2, but data.autoencoder.downscale is 4; set data.autoencoder.downscale=2" in shown
    words += ["data.autoencoder.downscale=2", "data.autoencoder.precision=fp32"]
    assert "says scaling_factor 0.18215" in in_process("encode", *data, *words, expect=2)
    words += ["data.autoencoder.scale=0.5"]
    in_process("encode", *data, *words)
    spec = Manifest.load(tmp_path / "shards").spec
    assert (spec.autoencoder, spec.channels, spec.latent_size, spec.scale) == ("ldm-vq-f4", 3, 8, 0.5)
    ours = VQAutoencoder("x", str(folder), 0.5)
    assert spec.autoencoder_revision == ours.revision
    stored = torch.from_numpy(MappedShards(tmp_path / "shards").gather(np.arange(4), np.zeros(4, dtype=bool))).float()
    assert not torch.equal(stored[:, :3], ours._quantized(stored[:, :3]).half().float())
    assert (stored[:, 3:] == -30).all()

    trained = [word for word in TINY_RUN if word != "experiment=demo" and not word.startswith("total_steps")]
    trained += ["total_steps=1", "checkpoint_every=1", "runtime=cpu", "precision=fp32", "data.shards=shards"]
    in_process("train", *trained, "data.normalize=false", "run_dir=run")
    in_process("sample", "checkpoint=run", "runtime=cpu", "num_images=2", "sampler.steps=2", "out=x")
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (2, 16, 16, 3)
    loaded = LoadedCheckpoint.load(str(tmp_path / "run"), "ema", AccelerateRuntime("fp32", device="cpu"))
    latent = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.autoencoder.decode(latent), ours.decode(latent))

    in_process("export", "checkpoint=run", "to=diffusers", "out=pipeline")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(pipeline.vae, VQModel)
    with torch.no_grad():
        theirs = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(theirs, ours.decode(latent), rtol=1e-4, atol=1e-5)


def test_a_kl_folder_read_as_vq_names_both_classes_and_the_option(tmp_path: Path) -> None:
    folder = str(make_autoencoder(tmp_path / "x"))
    with pytest.raises(
        ValueError, match=r"is a AutoencoderKL, but .* reads a VQModel; choose model/autoencoder=sd_vae"
    ):
        VQAutoencoder("x", folder)


def test_a_plan_takes_the_latents_of_an_autoencoder_from_its_settings(in_process: InProcess) -> None:
    found = {path.stem: planned_latents(OmegaConf.load(path)) for path in (CONF / "model/autoencoder").glob("*.yaml")}
    assert found["vq_f4"] == (4, 3)
    assert found["vq_f8"] == found["sdxl_vae"] == found["taesd"] == found["sd_vae_ema"] == (8, 4)
    assert (found["flux_vae"], found["dc_f32c32"], found["dc_f64c128"]) == ((8, 16), (32, 32), (64, 128))
    assert (found["identity"], found["identity_grey"]) == ((1, 3), (1, 1))
    shown = in_process("encode", "data=imagenet256", "model/autoencoder=vq_f8", "data.shards=shards", expect=2)
    assert "ldm-vq-f8 is not published in diffusers' format; give data.autoencoder.pretrained=FOLDER, a folder" in shown
    unknown = ["model/autoencoder=vq_f4", "data.autoencoder.downscale=null"]
    shown = in_process("plan", "data=imagenet256", *unknown, expect=2)
    assert "A plan does not read the weights of data.autoencoder; give data.autoencoder.downscale." in shown
