"""Latents are normalized per channel by the statistics of their shards, and images are decoded from them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess
from foreign_files import HEADS, released_weights, saved
from pictures import make_autoencoder

from core.deferred import Deferred
from core.latents import load_latents
from data.manifest import Manifest
from data.plan import identity_of
from data.shards import open_shards
from launch.builders.build import LoadedCheckpoint
from model.autoencoder import IdentityAutoencoder
from model.autoencoder_kl import DiffusersAutoencoder
from model.normalized import NormalizedAutoencoder
from runtime.accelerate import AccelerateRuntime


@pytest.mark.parametrize("channels", [4, 32])
def test_latents_of_any_number_of_channels_have_mean_0_and_deviation_1_and_decode_to_the_same_images(
    channels: int, tmp_path: Path
) -> None:
    folder = str(make_autoencoder(tmp_path / "weights", channels))
    numbers = torch.Generator().manual_seed(0)
    scale, shift = (1 + torch.rand(channels, generator=numbers)).tolist(), torch.rand(channels).tolist()
    scaled, plain = DiffusersAutoencoder("x", folder, scale, shift), DiffusersAutoencoder("x", folder, 1.0)
    moments = plain.moments(torch.randn(64, 3, 16, 16, generator=numbers))
    moments[:, channels:] = -30.0  # no variance
    unscaled = moments[:, :channels]
    mean, std = unscaled.mean((0, 2, 3)).tolist(), unscaled.std((0, 2, 3)).tolist()
    ours = NormalizedAutoencoder(scaled, mean, std)
    latents = ours.draw(moments, torch.zeros_like(unscaled))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(channels), rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.decode(latents[:3]), plain.decode(unscaled[:3]), rtol=1e-4, atol=1e-4)
    assert identity_of(ours) == identity_of(scaled)


@pytest.mark.parametrize("half", [True, False])
def test_latents_that_are_drawn_in_the_memory_of_their_normals_are_the_same(
    half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draw by compiled functions, which moments in float16 have, and by PyTorch."""
    monkeypatch.setattr("core.latents.FAST_LATENTS", Deferred("latents", load_latents, worth=0))
    encoded = DiffusersAutoencoder("x", str(make_autoencoder(tmp_path / "weights", 4)), 0.2, 0.1)
    for autoencoder in (encoded, NormalizedAutoencoder(encoded, [0.5] * 4, [2.0] * 4), IdentityAutoencoder(4)):
        moments = torch.randn(3, 8, 6, 5)
        moments = moments.half() if half else moments
        posterior = torch.randn(3, 4, 6, 5)
        expected = autoencoder.draw(moments, posterior.clone())
        assert autoencoder.draw(moments, posterior, out=posterior) is posterior
        assert torch.equal(posterior, expected)


def test_statistics_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="latent_mean has 2 numbers, but the latents of identity have 3 channels"):
        NormalizedAutoencoder(IdentityAutoencoder(3), [0.0, 1.0], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"latent_std is 0.0 in channel 1, by which latents cannot be divided"):
        NormalizedAutoencoder(IdentityAutoencoder(2), [0.0, 1.0], [1.0, 0.0])


def test_a_run_records_the_shards_statistics_and_jobs_decode_by_the_record(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "runtime=cpu", "total_steps=10"]
    in_process("train", *words, "data.normalize=true", "run_dir=run")
    in_process("train", *words, "run_dir=plain")
    manifest = Manifest.load(str(digits))
    state, plain = (
        json.loads(next((tmp_path / name / "checkpoints").glob("*10/state.json")).read_text())["config"]["data"]
        for name in ("run", "plain")
    )
    assert (state["latent_mean"], state["latent_std"]) == (manifest.latent_mean, manifest.latent_std)
    assert (plain["normalize"], plain["latent_mean"], plain["latent_std"]) == (False, None, None)
    lines = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("run", "plain")]
    assert lines[0]["loss"] != lines[1]["loss"]

    runtime = AccelerateRuntime("fp32", device="cpu")
    loaded = {name: LoadedCheckpoint.load(str(tmp_path / name), "ema", runtime) for name in ("run", "plain")}
    of_zero = {name: one.autoencoder.decode(torch.zeros(1, 1, 8, 8)).mean().item() for name, one in loaded.items()}
    assert of_zero == {"run": pytest.approx(manifest.latent_mean[0]), "plain": 0}
    in_process("sample", "checkpoint=run", "runtime=cpu", "num_images=4", "sampler.steps=2", "out=x")
    shown = in_process("train", *words, "run_dir=run", "total_steps=20", expect=2)
    assert "data.normalize is True there and False now" in shown
    shown = in_process("train", *words, "run_dir=other", "data.latent_std=[1.0]", expect=2)
    assert "data.latent_std is given in the config, but data.normalize is false; set data.normalize=true" in shown


def test_weights_of_other_programs_need_the_statistics_that_they_were_trained_with(
    tmp_path: Path, in_process: InProcess
) -> None:
    saved(tmp_path / "x.pt", released_weights())
    words = ["sample", "runtime=cpu", "num_images=2", "sampler.steps=2", "data.autoencoder.channels=4", HEADS]
    words += ["checkpoint=x.pt", "out=x", "data.normalize=true", "data.latent_std=[0.5,0.5,0.5,0.5]"]
    shown = in_process(*words, expect=2)
    assert "data.normalize is true in the config, but there is no data.latent_mean; give data.latent_mean and" in shown
    in_process(*words, "data.latent_mean=[0.5,0.5,0.5,0.5]")


def test_batches_of_a_normalized_run_have_the_statistics(digits: Path) -> None:
    manifest, shards = Manifest.load(str(digits)), open_shards(str(digits), True, "", 1)
    rows = np.arange(len(shards))
    moments = torch.from_numpy(shards.gather(rows, np.zeros(len(rows), dtype=bool)))
    ours = NormalizedAutoencoder(IdentityAutoencoder(1), manifest.latent_mean, manifest.latent_std)
    latents = ours.draw(moments, torch.zeros(len(rows), 1, 8, 8))
    assert latents.mean().item() == pytest.approx(0, abs=1e-3)
    assert latents.std().item() == pytest.approx(1, rel=1e-3)
    shards.close()
