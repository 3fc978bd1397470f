"""Our Inception network equals torch-fidelity's on random weights; extractors refuse other images and weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import torch_fidelity
from inception_weights import PREFIX, random_weights

from core.reading import sha256_of
from evaluation.features.inception import SHA256, URL, InceptionFeatures, load_inception
from evaluation.features.inception_network import Inception2015, resize_like_tensorflow
from evaluation.metrics.inception_score import InceptionScore
from evaluation.metrics.kernel import KernelInceptionDistance
from evaluation.metrics.statistics import FeatureStatistics
from evaluation.reference.reference import Reference


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def extractor(weights: Path) -> InceptionFeatures:
    return InceptionFeatures(str(weights), sha256=PREFIX)


def random_images(count: int, size: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def test_the_network_is_torch_fidelitys_bit_for_bit(weights: Path) -> None:
    extractors = torch_fidelity("feature_extractor_inceptionv3")
    theirs = extractors.FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    ours = load_inception(weights)
    seen: list[torch.Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.append(call[2]))
    for size in (8, 256, 350):
        images = torch.from_numpy(random_images(2, size)).permute(0, 3, 1, 2)
        with torch.no_grad():
            found, (pool, logits) = ours(images), theirs(images)
        assert torch.equal(found.pool, pool)
        assert torch.equal(found.logits, logits)
        spatial = seen.pop()
        assert spatial.shape == (2, 192, 17, 17)
        by_hand = [
            spatial[:, channel, row, column] for row in range(17) for column in range(17) for channel in range(7)
        ]
        assert torch.equal(found.spatial, torch.stack(by_hand, dim=1))
        assert found.pool.std() > 0.01


def test_the_parameters_have_the_public_names(weights: Path) -> None:
    extractors = torch_fidelity("feature_extractor_inceptionv3")
    theirs = extractors.FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(weights))
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in Inception2015().state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in Inception2015().parameters()) == 23_850_960


def test_a_checkpoint_of_before_pytorch_counted_batches_loads(weights: Path, tmp_path: Path) -> None:
    """Remove ``num_batches_tracked``, which newer modules have and the public file has not."""
    state = {
        name: value
        for name, value in torch.load(weights, weights_only=True).items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "old.pth")
    loaded, expected = load_inception(tmp_path / "old.pth").state_dict(), load_inception(weights).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


@pytest.mark.parametrize("size", [5, 256, 299, 512])
def test_the_resize_is_tensorflows(size: int) -> None:
    """Compute in float64 that output i lies at i * size / 299, between its two neighbors."""
    image = random_images(1, size)[0].astype(np.float64)
    places = np.arange(299) * size / 299
    before, fraction = np.floor(places).astype(int), places - np.floor(places)
    after = np.minimum(before + 1, size - 1)
    rows = image[before] * (1 - fraction)[:, None, None] + image[after] * fraction[:, None, None]
    expected = rows[:, before] * (1 - fraction)[:, None] + rows[:, after] * fraction[:, None]
    found = resize_like_tensorflow(torch.from_numpy(image).float().permute(2, 0, 1)[None], 299)
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=0.02)


def test_features_do_not_depend_on_the_batch_and_grey_is_three_equal_channels(
    weights: Path, extractor: InceptionFeatures
) -> None:
    images = random_images(3, 16, channels=1)
    together = extractor(images)
    one_by_one = InceptionFeatures(str(weights), sha256=PREFIX, batch_size=1)(images.repeat(3, axis=3))
    for name, size in (("vectors", 2048), ("spatial", 2023), ("logits", 1008)):
        found = getattr(together, name)
        assert (found.shape, found.dtype) == ((3, size), np.float32)
        np.testing.assert_allclose(found, getattr(one_by_one, name), rtol=1e-4, atol=1e-5)
    assert together.classes is None


def test_the_kernel_inception_distance_calls_itself_kid_where_images_are_too_few(extractor: InceptionFeatures) -> None:
    reference = Reference("r", "h", FeatureStatistics.empty(2048), None, num_vectors=5)
    with pytest.raises(ValueError, match=r"kid needs at least 1000 images .one subset., but there are 999"):
        KernelInceptionDistance().require(extractor, reference, 999)
    with pytest.raises(ValueError, match=r"kid needs at least 1000 images .one subset. in the reference, but r has 5"):
        KernelInceptionDistance().require(extractor, reference, 1000)


@pytest.mark.usefixtures("rounding_allowed")
def test_features_are_computed_in_full_float32_whatever_is_set_outside(extractor: InceptionFeatures) -> None:
    seen = []

    def look(*_: Any) -> None:
        conv, matmul = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
        seen.append((conv, matmul, torch.is_autocast_enabled("cpu")))

    hook = extractor._network.register_forward_hook(look)
    extractor(random_images(1, 8))
    hook.remove()
    assert seen == [("ieee", "ieee", False)]


def test_an_inception_score_needs_a_full_split(extractor: InceptionFeatures) -> None:
    reference = Reference("r", "h", FeatureStatistics.empty(2048), None)
    InceptionScore().require(extractor, reference, 5000)
    with pytest.raises(ValueError, match=r"inception_score needs at least 5000 images .one split., but there are 4999"):
        InceptionScore().require(extractor, reference, 4999)


def test_inception_stays_on_the_host_under_xla(weights: Path) -> None:
    """Compare with the CPU, since XLA multiplies float32 as bfloat16, in one program of all hosts. No TPU is needed."""
    extractor, images = InceptionFeatures(str(weights), sha256=PREFIX), random_images(2, 16)
    before = extractor(images).vectors
    extractor.to(torch.device("xla", 0))
    np.testing.assert_array_equal(extractor(images).vectors, before)


def test_other_weights_say_so_in_the_title(weights: Path, extractor: InceptionFeatures) -> None:
    assert extractor.hash == sha256_of(weights)
    assert extractor.title == f"2015 Inception features with other weights, sha256 {extractor.hash[:8]}"


def test_images_of_four_channels_are_refused(extractor: InceptionFeatures) -> None:
    with pytest.raises(ValueError, match="have 4 channels, but the Inception network sees 3"):
        extractor(random_images(1, 8, channels=4))


def test_missing_weights_are_one_sentence_that_says_what_to_fetch_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There are no Inception weights at") as raised:
        InceptionFeatures(cache=str(tmp_path))
    sentence = str(raised.value)
    assert f"{tmp_path}/pt_inception-2015-12-05-6726825d.pth; fetch {URL} (sha256 {SHA256[:8]}...)" in sentence
    for way in ("evaluation.features.weights=PATH", "DITSCALE_INCEPTION=PATH", "evaluation.features.download=true"):
        assert way in sentence
    assert "\n" not in sentence


def test_the_environment_names_the_weights(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITSCALE_INCEPTION", str(weights))
    assert InceptionFeatures(sha256=PREFIX).hash == sha256_of(weights)


def test_weights_of_another_hash_are_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match=f"has sha256 {sha256_of(weights)}, but the Inception weights have {SHA256}"):
        InceptionFeatures(str(weights))


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(2)}, Path("runs code when it is unpickled"), [1, 2]])
def test_a_file_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the Inception weights"):
        load_inception(tmp_path / "other.pth")
