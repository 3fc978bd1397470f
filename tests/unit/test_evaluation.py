"""Statistics equal closed forms, and images depend on their index alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import PatternSource, encode_pattern, silent_progress
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_model import golden_model

from data.conditions import ClassLabels
from data.images import CenterCrop
from data.manifest import LatentSpec
from data.sources import DigitsSource, load_images
from diffusion.guidance import Unguided
from diffusion.process import GaussianDiffusion
from diffusion.samplers import DDPM
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from evaluation.chunks import ChunkStore, TrainingChunks
from evaluation.evaluate import Evaluator, MeasurementProtocol
from evaluation.features.classifier import ClassifierFeatures
from evaluation.features.extractor import Features
from evaluation.generate import Generator
from evaluation.grid import save_grid
from evaluation.hooks import EvaluationHook
from evaluation.metrics.statistics import FeatureStatistics, Gaussian, covariance_root, frechet_distance
from evaluation.reference.reference import make_reference
from model.autoencoder import IdentityAutoencoder
from runtime.accelerate import AccelerateRuntime
from train.loggers import NoLogger
from train.runfolder import RunFolder
from train.state import TrainState

RANDOM = np.random.default_rng(0)


def features(count: int, size: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, size)) @ random.normal(size=(size, size))


def test_distance_of_a_distribution_to_itself_is_zero() -> None:
    statistics = FeatureStatistics.of(features(500, 16))
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-8)


def test_distance_of_a_shifted_gaussian_is_the_squared_shift() -> None:
    sample, shift = features(500, 16), np.linspace(0, 1, 16)
    distance = frechet_distance(FeatureStatistics.of(sample), FeatureStatistics.of(sample + shift))
    assert distance == pytest.approx(float(shift @ shift), rel=1e-9)


def test_distance_of_scaled_gaussians_is_the_closed_form() -> None:
    """Compare with the distance of commuting covariances C and s^2 C, which is (s - 1)^2 tr C."""
    sample = features(500, 8)
    sample -= sample.mean(axis=0)
    one, two = FeatureStatistics.of(sample), FeatureStatistics.of(3 * sample)
    assert frechet_distance(one, two) == pytest.approx(4 * np.trace(one.covariance), rel=1e-9)


def test_distance_equals_the_matrix_square_root_form() -> None:
    one, two = FeatureStatistics.of(features(400, 12, 1)), FeatureStatistics.of(features(300, 12, 2))
    root = scipy.linalg.sqrtm(one.covariance @ two.covariance).real
    expected = np.sum((one.mean - two.mean) ** 2) + np.trace(one.covariance + two.covariance - 2 * root)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(two, one) == pytest.approx(expected, rel=1e-8)


def test_distance_of_rank_deficient_covariances_is_the_closed_form() -> None:
    """Use fewer images than features: (1 - 1/2)^2 of the trace, from a covariance of rank 9 in 40 dimensions."""
    sample = features(10, 40)
    sample -= sample.mean(axis=0)
    one, two = FeatureStatistics.of(sample), FeatureStatistics.of(sample / 2)
    assert frechet_distance(one, two) == pytest.approx(np.trace(one.covariance) / 4, rel=1e-6)


def test_distance_of_features_without_variance_is_the_closed_form() -> None:
    """Use singular covariances of many images, as of dead ReLU features, also with an unknown number of images."""
    basis = np.linalg.qr(features(40, 40, seed=3))[0]  # so that rounding reaches the eigenvalues that are zero
    sample = np.concatenate([features(500, 12), np.zeros((500, 28))], axis=1) @ basis
    sample -= sample.mean(axis=0)
    one, two = FeatureStatistics.of(sample), FeatureStatistics.of(3 * sample)
    expected = 4 * np.trace(one.covariance)
    unknown = [Gaussian(statistics.mean, statistics.covariance) for statistics in (one, two)]
    for first, second in ((one, two), (two, one), (unknown[0], unknown[1]), (unknown[1], one)):
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_distance_of_few_images_far_from_the_origin_is_that_of_the_nuclear_norm() -> None:
    """Use sums whose rounding far exceeds that of eigenvalues, so that only the number of images identifies it."""
    one, two = (sample - sample.mean(axis=0) for sample in (features(10, 40, 1), features(12, 40, 2)))
    nuclear = np.linalg.svd(one @ two.T, compute_uv=False).sum() / np.sqrt(9 * 11)
    expected = (one**2).sum() / 9 + (two**2).sum() / 11 - 2 * nuclear
    statistics = [FeatureStatistics.of(sample + 1000) for sample in (one, two)]
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(*reversed(statistics)) == pytest.approx(expected, rel=1e-6)
    roots = np.linalg.svd(one, compute_uv=False)[:9] / 3
    unit = Gaussian(statistics[0].mean, np.eye(40))
    assert frechet_distance(statistics[0], unit) == pytest.approx(((roots - 1) ** 2).sum() + 31, abs=1e-6)


def test_a_matrix_with_negative_eigenvalues_is_no_covariance() -> None:
    with pytest.raises(ValueError, match=r"has an eigenvalue of -2, but a covariance has none below 0"):
        covariance_root(np.diag([3.0, -2.0]), 2)


@given(cuts=st.lists(st.integers(0, 200), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_statistics_of_parts_add_up_to_the_whole(cuts: list[int]) -> None:
    sample = features(200, 6).astype(np.float32)
    whole = FeatureStatistics.of(sample)
    merged = FeatureStatistics.empty(6)
    for part in np.split(sample, sorted(cuts)):
        merged += FeatureStatistics.of(part)
    assert merged.count == 200
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(sample.astype(np.float64), rowvar=False), rtol=1e-9)


def test_a_covariance_of_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images, but there are 1"):
        _ = FeatureStatistics.of(features(1, 4)).covariance


def generator() -> Generator:
    spec = LatentSpec("golden", 8, "identity", "1", 1.0, 1, 4, "float16", False, 10)
    process = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
    runtime, labels = AccelerateRuntime("fp32", device="cpu"), ClassLabels(10)
    network = Unguided(golden_model()[0].eval(), labels.null, 4)
    return Generator(network, process, IdentityAutoencoder(4), DDPM(10), spec, labels, 0, runtime)


def test_an_image_does_not_depend_on_the_batch_it_is_made_in() -> None:
    make, condition = generator(), ClassLabels(10).in_turn(12)
    batches = {
        size: np.concatenate([images for _, images in make.batches(condition, 12, size)]).astype(int)
        for size in (1, 5, 12)
    }
    assert batches[12].shape == (12, 8, 8, 4)
    assert batches[12].std() > 10
    for size in (1, 5):  # a rounding boundary may be crossed by float error, not more
        assert np.abs(batches[size] - batches[12]).max() <= 1
        assert (batches[size] != batches[12]).mean() < 0.01


def test_images_are_rounded_as_in_the_released_sampling_code() -> None:
    """Check that x becomes level v where 127.5 x + 128 is in [v, v + 1), clipped at both ends."""
    levels = np.linspace(-10, 270, 2 * 4 * 8 * 8)
    given = torch.from_numpy((levels - 128) / 127.5).float().reshape(2, 4, 8, 8)
    make = replace(generator(), sampler=lambda *_: given)
    expected = np.floor(levels).clip(0, 255).reshape(2, 4, 8, 8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(make.images(np.arange(2), {}), expected)


def test_another_index_or_seed_gives_another_image() -> None:
    make = generator()
    condition = ClassLabels(10).given([0], 2)
    first, second = make.images(np.array([0, 1]), condition)
    assert not np.array_equal(first, second)
    other = Generator(**{**vars(make), "seed": 1}).images(np.array([0, 1]), condition)
    assert not np.array_equal(first, other[0])


def test_labels_outside_the_classes_are_refused() -> None:
    assert ClassLabels(10).given([3, 10], 4)["label"].tolist() == [3, 10, 3, 10]
    with pytest.raises(ValueError, match="labels has 11, but this model knows the classes 0 to 9"):
        ClassLabels(10).given([3, 11], 4)


def test_the_digit_classifier_is_accurate_and_trained_once(tmp_path: Path) -> None:
    first = ClassifierFeatures(DigitsSource(), 8, str(tmp_path), epochs=8)
    trained_at = next(tmp_path.glob("classifier-*/model.safetensors")).stat().st_mtime_ns
    second = ClassifierFeatures(DigitsSource(), 8, str(tmp_path), epochs=8)
    assert first.hash == second.hash
    assert next(tmp_path.glob("classifier-*/model.safetensors")).stat().st_mtime_ns == trained_at
    assert first.facts["classifier_accuracy"] > 0.95
    images, labels = load_images(DigitsSource(), 8)
    found = second(images[:100])
    assert found.vectors.shape == (100, 64)
    assert found.classes is not None
    assert (found.classes == labels[:100]).mean() > 0.95


def test_the_classifier_sees_the_images_that_were_encoded(tmp_path: Path) -> None:
    """Crop the images where the source has other sizes than the data set."""
    cut = ClassifierFeatures(PatternSource(size=12), 8, str(tmp_path), crop=CenterCrop(), epochs=1)
    images, _ = load_images(PatternSource(size=12), 8, CenterCrop())
    assert cut(images).vectors.shape == (50, 64)
    with pytest.raises(ValueError, match=r"is 12x12, but data.image_size is 8"):
        ClassifierFeatures(PatternSource(size=12), 8, str(tmp_path), epochs=1)


class PixelFeatures:
    """An extractor whose features are pixels and whose class is the brightest column."""

    title, hash, facts = "pixels", "0", {"classifier_accuracy": 1.0}

    def __call__(self, images: np.ndarray) -> Features:
        flat = images.reshape(len(images), -1).astype(np.float32)
        return Features(flat, images[..., 0].sum(axis=1).argmax(axis=1))


def test_evaluation_records_its_protocol_and_recounts(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    make = generator()
    extractor = PixelFeatures()
    reference = make_reference(PatternSource(), 8, extractor)
    # The pattern has one channel, the golden network four: compare with the generator's own images instead.
    condition = ClassLabels(10).in_turn(30)
    labels = condition["label"].numpy()
    own = make.all_images(condition, 30, 30)
    found = extractor(own)
    reference = type(reference)("own", "hash", FeatureStatistics.of(found.vectors), 0.0)
    protocol = MeasurementProtocol({"name": "ddpm", "steps": 10}, {"name": "unguided"}, 30, 0, "fp32")
    record = Evaluator(extractor, reference, protocol, 7).evaluate(make, silent_progress)
    assert record["frechet_distance"] < 1e-2 * np.trace(FeatureStatistics.of(found.vectors).covariance)
    assert found.classes is not None
    assert record["recognized_fraction"] == pytest.approx((found.classes == labels).mean(), abs=0.04)
    assert (record["num_images"], record["sampler"]) == (30, {"name": "ddpm", "steps": 10})
    with pytest.raises(ValueError, match="num_images is 1, but a covariance needs at least 2"):
        MeasurementProtocol({}, {}, 1, 0, "fp32")


def test_a_grid_shows_each_image_in_its_place(tmp_path: Path) -> None:
    images = np.stack([np.full((8, 8, 1), 40 * number, np.uint8) for number in range(6)])
    save_grid(tmp_path / "grid.png", images, columns=3)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 66 + 2, 3 * 66 + 2)
    assert [int(pixels[y, x]) for y in (30, 100) for x in (30, 100, 160)] == [0, 40, 80, 120, 160, 200]


def test_a_killed_run_makes_up_for_the_evaluation_that_it_owed(tmp_path: Path) -> None:
    folder, runtime = RunFolder(tmp_path), generator().runtime
    calls: list[int] = []

    def measure(_: ChunkStore) -> dict[str, Any]:
        calls.append(1)
        return {"num_images": 7, "frechet_distance": 1.0}

    def hook() -> EvaluationHook:
        identity = {"weights": "ema", "num_images": 7}
        facts, chunks = {"weights": "ema"}, TrainingChunks(tmp_path / "chunks", {})
        return EvaluationHook(2, measure, chunks, lambda _: facts, identity, folder, NoLogger(), runtime)

    state = TrainState(None, None, None, batch_size=4, total_steps=9, step=4)  # type: ignore[arg-type]
    folder.append(folder.evaluations, {"step": 4, "weights": "model", "num_images": 7})  # somebody else's
    hook().start(state)
    assert len(calls) == 1
    hook().start(state)  # owed nothing any more
    assert len(calls) == 1
    state.step = 3
    hook().start(state)  # nothing was due
    assert len(calls) == 1
