"""diffusers' autoencoder behind our interface gives the same numbers, its own identity, and clear errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pictures import make_autoencoder, photo

from data.images import CenterCrop, to_unit_range
from model.autoencoder_kl import DiffusersAutoencoder

SCALE = 0.18215


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_autoencoder(tmp_path_factory.mktemp("autoencoder") / "weights")


def images(count: int = 3, size: int = 16) -> torch.Tensor:
    return to_unit_range(np.stack([CenterCrop()(photo(number), size) for number in range(count)]))


def test_moments_draws_and_images_are_those_of_diffusers(folder: Path) -> None:
    ours, theirs = DiffusersAutoencoder("x", str(folder), SCALE), AutoencoderKL.from_pretrained(folder)
    assert (ours.downscale, ours.channels) == (2, 4)
    with torch.no_grad():
        posterior = theirs.encode(images()).latent_dist
        moments = ours.moments(images())
        assert torch.equal(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
        noise = torch.randn(posterior.mean.shape)
        expected = (posterior.mean + posterior.std * noise) * SCALE
        latent = ours.draw(moments, noise)
        torch.testing.assert_close(latent, expected)
        torch.testing.assert_close(ours.decode(latent), theirs.decode(latent / SCALE).sample)


def test_an_encoder_is_not_flip_equivariant(folder: Path) -> None:
    """Check the reason why both orientations are encoded."""
    ours = DiffusersAutoencoder("x", str(folder), SCALE)
    plain, mirrored = ours.moments(images()), ours.moments(images().flip(3))
    assert (mirrored - plain.flip(3)).abs().max() > 0.1 * plain.abs().max()


def test_scale_and_shift_may_be_of_each_channel(folder: Path) -> None:
    scale, shift = [0.5, 1.0, 2.0, 4.0], [0.0, 1.0, -1.0, 0.5]
    ours = DiffusersAutoencoder("x", str(folder), scale, shift)
    moments = ours.moments(images())
    latent = ours.draw(moments, torch.zeros(3, 4, 8, 8))
    for channel in range(4):
        torch.testing.assert_close(latent[:, channel], (moments[:, channel] - shift[channel]) * scale[channel])
    plain = DiffusersAutoencoder("x", str(folder), 1.0)
    torch.testing.assert_close(ours.decode(latent), plain.decode(moments[:, :4]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="scale has 2 values, but the autoencoder has 4 channels"):
        DiffusersAutoencoder("x", str(folder), [1.0, 2.0])


def test_bf16_is_close_to_fp32_and_gives_float32(folder: Path) -> None:
    exact, coarse = (DiffusersAutoencoder("x", str(folder), SCALE, precision=p) for p in ("fp32", "bf16"))
    assert coarse.moments(images()).dtype == torch.float32
    difference = (coarse.moments(images()) - exact.moments(images())).abs().max()
    assert 0 < difference < 0.1 * exact.moments(images()).abs().max()


def test_the_revision_is_of_the_weights_not_of_their_place(folder: Path, tmp_path: Path) -> None:
    moved = make_autoencoder(tmp_path / "elsewhere")
    other = make_autoencoder(tmp_path / "other", seed=1)
    revisions = [DiffusersAutoencoder("x", str(path), SCALE).revision for path in (folder, moved, other)]
    assert revisions[0] == revisions[1] != revisions[2]
    assert DiffusersAutoencoder("x", str(folder), SCALE, precision="bf16").revision == revisions[0]


def test_an_autoencoder_that_is_not_there_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for place in (str(tmp_path / "absent"), "nobody/no-such-autoencoder"):
        with pytest.raises(ValueError, match=rf"The autoencoder '{place}' cannot be loaded .*; set data.autoencoder"):
            DiffusersAutoencoder("x", place, SCALE)
    make_autoencoder(tmp_path / "pickled")
    weights = tmp_path / "pickled/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))  # a pickle, were it one
    with pytest.raises(ValueError, match="cannot be loaded"):
        DiffusersAutoencoder("x", str(tmp_path / "pickled"), SCALE)
