"""Every metric equals an independent implementation, and merged statistics of parts equal those of the whole."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import torch_fidelity

from evaluation.chunks import chunks_of
from evaluation.features.extractor import Features
from evaluation.metrics import manifolds
from evaluation.metrics.collectors import Collects, RowsOf, SplitSumsOf, StatisticsOf
from evaluation.metrics.frechet import FrechetDistance
from evaluation.metrics.inception_score import InceptionScore
from evaluation.metrics.kernel import KernelDistance
from evaluation.metrics.manifolds import PrecisionRecall
from evaluation.metrics.statistics import FeatureStatistics, Gaussian, frechet_distance
from evaluation.reference.reference import Reference

CPU = torch.device("cpu")


def rows(count: int, size: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Return correlated float32 features."""
    mixing = np.random.default_rng(99).normal(size=(size, size)) / np.sqrt(size)
    return (np.random.default_rng(seed).normal(size=(count, size)) @ mixing + shift).astype(np.float32)


def reference_of(real: np.ndarray) -> Reference:
    return Reference("r", "h", FeatureStatistics.of(real), None, num_vectors=len(real), load_vectors=lambda: real)


def in_parallel(world: int, work: Callable[[int, Callable[[np.ndarray], np.ndarray]], Any]) -> list[Any]:
    """Return the results of ``work(rank, gather)`` in ``world`` threads that gather from each other."""
    barrier, slots, results = threading.Barrier(world), [np.empty(0)] * world, [None] * world

    def run(rank: int) -> None:
        def gather(mine: np.ndarray) -> np.ndarray:
            slots[rank] = mine
            barrier.wait()
            together = np.concatenate(slots)
            barrier.wait()
            return together

        results[rank] = work(rank, gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def collected(kind: Collects, features: Features, world: int = 1, batch: int = 16) -> list[Any]:
    """Return what each of ``world`` processes has after merging; they take chunks in turn."""
    count = len(features.vectors)

    def work(rank: int, gather: Callable[[np.ndarray], np.ndarray]) -> Any:
        collector = kind.start(count)
        for chunk in chunks_of(count, batch, rank, world):
            part = Features(*(None if rows is None else rows[chunk.indices] for rows in features))
            collector.add(chunk.indices, part)
        return collector.merged(gather)

    return in_parallel(world, work)


@pytest.mark.parametrize("world", [1, 2, 7])
def test_statistics_of_1_2_and_7_processes_are_those_of_all_images(world: int) -> None:
    """Use 100 images in chunks of 16, which are 7 chunks; with 40 images, 4 of 7 processes get none."""
    for count in (100, 40):
        sample = rows(count, 20, 1)
        for merged in collected(StatisticsOf("vectors"), Features(sample), world):
            assert merged.count == count
            np.testing.assert_allclose(merged.mean, sample.astype(np.float64).mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(merged.covariance, np.cov(sample.astype(np.float64), rowvar=False), rtol=1e-10)
        for merged in collected(RowsOf("vectors"), Features(sample), world):
            np.testing.assert_array_equal(merged, sample)


@pytest.mark.parametrize("world", [1, 2, 7])
def test_the_inception_score_is_that_of_torch_fidelity_for_any_number_of_processes(world: int) -> None:
    logits = 3 * rows(120, 12, 2)
    expected = torch_fidelity("metric_isc").isc_features_to_metric(torch.from_numpy(logits), splits=4, shuffle=False)
    metric = InceptionScore(split_size=30)
    for merged in collected(metric.collects, Features(logits, logits=logits), world):
        found = metric.compute(merged, reference_of(logits), CPU)
        assert found["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-10)
        assert found["inception_score_std"] == pytest.approx(expected["inception_score_std"], rel=1e-8)


def test_the_last_split_may_be_shorter_as_in_adms_suite() -> None:
    logits = 3 * rows(50, 12, 2)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for start in (0, 40):  # of 40 and of 10 images, which count the same
        part = p[start : start + 40]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    metric = InceptionScore(split_size=40)
    merged = collected(SplitSumsOf(40), Features(logits, logits=logits))[0]
    assert metric.compute(merged, reference_of(logits), CPU)["inception_score"] == pytest.approx(np.mean(scores))


def test_certain_and_varied_classes_score_their_number() -> None:
    logits = 200 * np.eye(10, dtype=np.float32)[np.arange(40) % 10]
    metric = InceptionScore(split_size=20)
    merged = collected(metric.collects, Features(logits, logits=logits))[0]
    assert metric.compute(merged, reference_of(logits), CPU)["inception_score"] == pytest.approx(10)


def test_the_frechet_distance_is_that_of_torch_fidelity() -> None:
    real, fake = rows(400, 32, 1), rows(300, 32, 2, shift=0.2)
    theirs = torch_fidelity("metric_fid")
    both = [theirs.fid_features_to_statistics(torch.from_numpy(part.astype(np.float64))) for part in (fake, real)]
    expected = theirs.fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    merged = collected(StatisticsOf("vectors"), Features(fake))[0]
    found = FrechetDistance().compute(merged, reference_of(real), CPU)
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-8)


def reflected(eigenvalues: np.ndarray) -> np.ndarray:
    """Return a dense covariance with these eigenvalues: H diag H with the reflection H = I - 2 v v^T."""
    size = len(eigenvalues)
    v = np.random.default_rng(5).normal(size=size)
    v /= np.linalg.norm(v)
    scaled = eigenvalues * v
    covariance = np.diag(eigenvalues) - 2 * (np.outer(v, scaled) + np.outer(scaled, v))
    covariance += 4 * (v @ scaled) * np.outer(v, v)
    return (covariance + covariance.T) / 2


SIZE = 2048
SPECTRUM = 10.0 / np.arange(1, SIZE + 1)


@pytest.mark.parametrize("rank", [SIZE, 1000], ids=["full rank", "rank 1000"])
def test_the_distance_in_2048_dimensions_is_within_1e_5_of_the_closed_form(rank: int) -> None:
    """Use commuting covariances, |m1 - m2|^2 + sum (sqrt a - sqrt b)^2, also with the deficient one first."""
    first = Gaussian(np.zeros(SIZE), reflected(SPECTRUM))
    other = np.where(np.arange(SIZE) < rank, 1.5 * SPECTRUM, 0)
    second = Gaussian(np.full(SIZE, 0.01), reflected(other), count=rank + 1)
    expected = SIZE * 0.01**2 + ((np.sqrt(SPECTRUM) - np.sqrt(other)) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)
    if rank < SIZE:
        assert frechet_distance(second, first) == pytest.approx(expected, abs=1e-6)


def test_the_distance_of_300_to_200_images_in_600_dimensions_is_that_of_the_nuclear_norm() -> None:
    """Compute tr (C1 C2)^(1/2) as the nuclear norm of X1 X2^T over the roots of n - 1, of centered images X."""
    spectrum = SPECTRUM[:600]
    first, second = (np.random.default_rng(n).normal(size=(n, 600)) * np.sqrt(spectrum) + 0.4 for n in (300, 200))
    one, two = first - first.mean(axis=0), second - second.mean(axis=0)
    nuclear = np.linalg.svd(one @ two.T, compute_uv=False).sum() / np.sqrt(299 * 199)
    difference = first.mean(axis=0) - second.mean(axis=0)
    expected = difference @ difference + (one**2).sum() / 299 + (two**2).sum() / 199 - 2 * nuclear
    statistics = [FeatureStatistics.of(part) for part in (first, second)]
    assert frechet_distance(*statistics) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(statistics[0], statistics[0]) == pytest.approx(0, abs=1e-6)


def test_a_shifted_gaussian_is_its_squared_shift_away_however_the_images_are_divided() -> None:
    real = rows(200, 24, 1)
    shift = np.linspace(0, 1, 24, dtype=np.float32)
    for world in (1, 2, 7):
        merged = collected(StatisticsOf("vectors"), Features(real + shift), world)[0]
        found = FrechetDistance().compute(merged, reference_of(real), CPU)["frechet_distance"]
        assert found == pytest.approx(float(shift.astype(np.float64) @ shift), rel=1e-5)


def test_precision_and_recall_are_those_of_torch_fidelity_in_blocks_of_any_size() -> None:
    real, fake = rows(150, 6, 1), 0.7 * rows(200, 6, 2, shift=0.3)
    expected = torch_fidelity("metric_prc").calculate_precision_recall_full(
        torch.from_numpy(fake), torch.from_numpy(real), neighborhood=3
    )
    assert 0.2 < min(expected) < max(expected) < 0.98
    for block in (7, 64, 10_000):
        found = PrecisionRecall(block=block).compute(fake, reference_of(real), CPU)
        assert (found["precision"], found["recall"]) == pytest.approx(expected)


def half_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return squared distances, rounded to float16 after each operation, one pair at a time."""
    u, v = first.astype(np.float16), second.astype(np.float16)
    squares, others = (
        np.array([np.float16((row * row).astype(np.float32).sum(dtype=np.float32)) for row in part]) for part in (u, v)
    )
    products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
    return np.maximum(squares[:, None] - np.float16(2) * products + others[None], np.float16(0)).astype(np.float32)


def test_adms_fp16_distances_are_rounded_after_each_operation() -> None:
    real, fake = rows(120, 12, 1, shift=9), 0.8 * rows(140, 12, 2) + np.float32(9.5)
    assert np.isfinite(half_distances(real, fake)).all()

    def radii(rows: np.ndarray) -> np.ndarray:
        return np.partition(half_distances(rows, rows), 3, axis=1)[:, 3]

    # The order of the operands changes the rounding: ADM's table of distances has the reference's images as its rows.
    table = half_distances(real, fake)
    precision = float((table <= radii(real)[:, None]).any(axis=0).mean())
    recall = float((table <= radii(fake)).any(axis=1).mean())
    assert precision != float((half_distances(fake, real) <= radii(real)).any(axis=1).mean())

    found = PrecisionRecall(distances="adm_fp16", block=50).compute(fake, reference_of(real), CPU)
    assert found == {"precision": precision, "recall": recall}
    assert found != PrecisionRecall().compute(fake, reference_of(real), CPU)  # the rounding is seen


def test_features_too_large_for_fp16_fall_back_to_fp32() -> None:
    real, fake = 1000 * rows(60, 8, 1), 1000 * rows(70, 8, 2)
    found = PrecisionRecall(distances="adm_fp16").compute(fake, reference_of(real), CPU)
    assert found == PrecisionRecall().compute(fake, reference_of(real), CPU)


@pytest.mark.usefixtures("rounding_allowed")
def test_distances_are_computed_in_full_float32_whatever_is_set_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return manifolds.fp32_squared_distances(first, second)

    monkeypatch.setitem(manifolds._DISTANCES, "fp32", distances)
    PrecisionRecall().compute(rows(9, 4, 1), reference_of(rows(9, 4, 2)), CPU)
    assert set(seen) == {("ieee", False)}


def test_the_same_images_are_precise_complete_and_at_no_distance() -> None:
    real = rows(100, 8, 1)
    assert PrecisionRecall().compute(real, reference_of(real), CPU) == {"precision": 1.0, "recall": 1.0}
    found = FrechetDistance().compute(FeatureStatistics.of(real), reference_of(real), CPU)
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-9)


def test_an_image_on_the_border_of_a_ball_is_inside() -> None:
    """Use copies of one image: their balls have radius 0 and contain each other."""
    copies = np.ones((6, 4), np.float32)
    assert PrecisionRecall().compute(copies, reference_of(copies), CPU) == {"precision": 1.0, "recall": 1.0}


def test_the_kernel_distance_over_all_images_is_that_of_torch_fidelity() -> None:
    real, fake = rows(90, 10, 1), rows(90, 10, 2, shift=0.5)
    expected = torch_fidelity("metric_kid").kid_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), kid_subsets=1, kid_subset_size=90, verbose=False
    )
    found = KernelDistance(subsets=1, subset_size=90).compute(fake, reference_of(real), CPU)
    assert found["kernel_distance"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)


def test_the_kernel_distance_depends_on_its_seed_and_is_unbiased() -> None:
    real, fake = rows(400, 10, 1), rows(500, 10, 2)
    settings = {"subsets": 60, "subset_size": 50}
    found = [KernelDistance(**settings, seed=seed).compute(fake, reference_of(real), CPU) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert abs(found[0]["kernel_distance"]) < 3 * found[0]["kernel_distance_std"] / np.sqrt(60) + 0.02
    same = KernelDistance(**settings).compute(real, reference_of(real), CPU)  # of each side other images are chosen
    assert abs(same["kernel_distance"]) < 3 * same["kernel_distance_std"] / np.sqrt(60) + 0.02
    shifted = KernelDistance(**settings).compute(fake + 0.5, reference_of(real), CPU)
    assert shifted["kernel_distance"] > 10 * abs(found[0]["kernel_distance"])


class Pixels:
    title, hash, facts = "pixels", "0", {}


@pytest.mark.parametrize(
    ("metric", "num_images", "num_real", "words"),
    [
        (FrechetDistance(), 1, 9, "frechet needs at least 2 images .a covariance., but there are 1"),
        (PrecisionRecall(), 3, 9, "precision_recall needs at least 4 images .3 neighbors., but there are 3"),
        (PrecisionRecall(), 9, 2, "needs at least 4 images .3 neighbors. in the reference, but r has 2"),
        (KernelDistance(), 999, 2000, "kernel needs at least 1000 images .one subset., but there are 999"),
        (KernelDistance(), 1000, 5, "needs at least 1000 images .one subset. in the reference, but r has 5"),
    ],
)
def test_too_few_images_for_a_metric_are_refused_with_both_numbers(
    metric: Any, num_images: int, num_real: int, words: str
) -> None:
    reference = replace(reference_of(rows(20, 4, 0)), num_vectors=num_real)
    with pytest.raises(ValueError, match=words):
        metric.require(Pixels(), reference, num_images)
