"""ADM's and our reference files are read; a reference that does not fit is refused."""

import json
import threading
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PatternSource, encode_pattern, silent_progress
from inception_weights import random_weights
from test_metrics import in_parallel

from core.npz import headers_of
from data.sources import Example
from evaluation.features.extractor import Features
from evaluation.features.inception import InceptionFeatures
from evaluation.metrics.frechet import FrechetDistance, SpatialFrechetInceptionDistance
from evaluation.metrics.statistics import FeatureStatistics, frechet_distance
from evaluation.reference import reference as references
from evaluation.reference.file import write_reference
from evaluation.reference.image_sets import ShardImages, SourceImages
from evaluation.reference.reference import make_reference, read_reference
from model.autoencoder import IdentityAutoencoder


@dataclass
class Projected:
    """Extracts random projections of pixels, others as spatial features, and counts its images."""

    title: str = "projections"
    hash: str = "a" * 64
    facts: dict[str, float] = field(default_factory=dict)
    seen: int = 0

    def __call__(self, images: np.ndarray) -> Features:
        self.seen += len(images)
        flat = images.reshape(len(images), -1) / 255
        random = np.random.default_rng(0)
        vectors, spatial = (flat @ random.normal(size=(flat.shape[1], size)) for size in (6, 4))
        return Features(vectors.astype(np.float32), spatial=spatial.astype(np.float32))


@dataclass
class Process:
    """The part of a runtime that a reference needs."""

    data_rank: int
    data_world: int
    gather: Any

    @property
    def is_main(self) -> bool:
        return self.data_rank == 0


def write(path: Path, images: Any = None, extractor: Any = None, world: int = 1, **changes: Any) -> None:
    settings: dict[str, Any] = {"num_kept": 20, "seed": 0, "batch_size": 8} | changes
    images, extractor = images or SourceImages(PatternSource(), 8), extractor or Projected()

    def work(rank: int, gather: Any) -> None:
        runtime = Process(rank, world, gather)
        write_reference(path, images, extractor, runtime=runtime, progress=silent_progress, **settings)

    in_parallel(world, work)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("world", [1, 2, 9])
def test_a_reference_of_any_number_of_processes_has_adms_arrays(tmp_path: Path, world: int) -> None:
    """Use 50 images in batches of 8, which are 7 batches, so that 2 of 9 processes get none."""
    write(tmp_path / "r.npz", world=world)
    arrays = arrays_of(tmp_path / "r.npz")
    images = SourceImages(PatternSource(), 8).images(np.arange(50))
    features = Projected()(images)
    for rows, suffix in ((features.vectors, ""), (features.spatial, "_s")):
        assert rows is not None
        np.testing.assert_allclose(arrays[f"mu{suffix}"], rows.mean(axis=0, dtype=np.float64), rtol=1e-6)
        covariance = np.cov(rows.astype(np.float64), rowvar=False)
        np.testing.assert_allclose(arrays[f"sigma{suffix}"], covariance, rtol=1e-6, atol=1e-9)
    kept = arrays["arr_0"]
    assert (kept.shape, kept.dtype) == ((20, 8, 8, 1), np.uint8)
    places = [int(np.flatnonzero((images == image).all(axis=(1, 2, 3)))[0]) for image in kept]
    assert len(set(places)) == 20
    assert places != sorted(places)
    about = json.loads(str(arrays["about"]))
    assert (about["images"], about["num_classes"], about["feature_extractor_hash"]) == (50, 5, "a" * 64)


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.npz")
    write(tmp_path / "b.npz", batch_size=8)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    write(tmp_path / "b.npz", seed=1)
    assert (tmp_path / "a.npz").read_bytes() != (tmp_path / "b.npz").read_bytes()


def test_shards_of_the_identity_decode_to_the_images_of_their_source(tmp_path: Path) -> None:
    encode_pattern(tmp_path / "shards")
    shards = ShardImages(str(tmp_path / "shards"), IdentityAutoencoder(1), True, "", 0)
    source = SourceImages(PatternSource(), 8)
    decoded, images = (images.images(np.arange(50)) for images in (shards, source))
    assert {image.tobytes() for image in decoded} == {image.tobytes() for image in images}
    write(tmp_path / "a.npz", shards)
    write(tmp_path / "b.npz", source)
    one, two = arrays_of(tmp_path / "a.npz"), arrays_of(tmp_path / "b.npz")
    np.testing.assert_allclose(one["mu"], two["mu"], rtol=1e-10)
    np.testing.assert_allclose(one["sigma"], two["sigma"], rtol=1e-8, atol=1e-12)
    assert json.loads(str(one["about"]))["name"] == "pattern decoded by identity 1"


def test_shards_of_another_autoencoder_are_refused(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    other = IdentityAutoencoder(1)
    other.revision = "2"
    with pytest.raises(ValueError, match="were made by the autoencoder identity 1, but the config has identity 2"):
        ShardImages(str(tmp_path), other, True, "", 0)


def test_a_read_reference_is_the_one_that_was_written(tmp_path: Path) -> None:
    write(tmp_path / "r.npz", num_kept=1000)
    extractor = Projected()
    reference = read_reference(tmp_path / "r.npz", extractor, tmp_path / "cache", silent_progress)
    images = SourceImages(PatternSource(), 8).images(np.arange(50))
    features = Projected()(images)
    same, other = FeatureStatistics.of(features.vectors), FeatureStatistics.of(features.vectors[:30] + 1)
    assert frechet_distance(reference.statistics, same) == pytest.approx(0, abs=1e-8)
    expected = FrechetDistance().compute(other, make_reference(PatternSource(), 8, extractor), None)  # type: ignore[arg-type]
    assert FrechetDistance().compute(other, reference, None) == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]
    assert features.spatial is not None
    spatial = SpatialFrechetInceptionDistance().compute(FeatureStatistics.of(features.spatial), reference, None)  # type: ignore[arg-type]
    assert spatial["sfid"] == pytest.approx(0, abs=1e-8)
    assert (reference.num_vectors, reference.image_size, reference.num_classes) == (50, 8, 5)
    assert (reference.statistics.count, reference.name) == (50, "pattern")
    assert sorted(map(tuple, reference.vectors())) == sorted(map(tuple, features.vectors))


def test_features_and_roots_are_computed_once_for_a_file_an_extractor_and_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "r.npz")

    def images_seen(**changes: Any) -> int:
        extractor = Projected(**changes)
        reference = read_reference(tmp_path / "r.npz", extractor, tmp_path / "cache", silent_progress)
        assert reference.statistics.root.shape[0] == 6
        threads = [threading.Thread(target=reference.vectors) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert reference.vectors().shape == (20, 6)
        return extractor.seen

    assert images_seen() == 20
    assert images_seen() == 0
    write(tmp_path / "r.npz", seed=1)
    assert images_seen() == 20  # another file
    names = sorted(path.name for path in (tmp_path / "cache").glob("*/*.npy"))
    assert names == ["root-sigma.npy", "root-sigma.npy", "vectors.npy", "vectors.npy"]
    for path in (tmp_path / "cache").glob("*/vectors.npy"):
        path.write_bytes(path.read_bytes()[:-1])
    assert images_seen() == 20  # made again
    assert images_seen() == 0
    monkeypatch.setattr(references, "source_hash", lambda *_: "another version")
    assert images_seen() == 20


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> InceptionFeatures:
    return InceptionFeatures(str(random_weights(tmp_path_factory.mktemp("weights"))), sha256="")


def adm_arrays() -> dict[str, np.ndarray]:
    """Return arrays with the names, shapes and types of ADM's files."""
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"arr_0": random.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)}
    for size, suffix in ((2048, ""), (2023, "_s")):
        arrays[f"mu{suffix}"] = random.normal(size=size).astype(np.float32)
        arrays[f"sigma{suffix}"] = np.diag(random.uniform(1, 2, size))
    return arrays


def test_adms_files_are_read_as_they_are(tmp_path: Path, inception: InceptionFeatures) -> None:
    arrays = adm_arrays()
    np.savez(tmp_path / "VIRTUAL_imagenet16_labeled.npz", **arrays)
    path = tmp_path / "VIRTUAL_imagenet16_labeled.npz"
    reference = read_reference(path, inception, tmp_path / "cache", silent_progress)
    assert (reference.name, reference.image_size, reference.num_vectors) == (path.name, 16, 6)
    np.testing.assert_array_equal(reference.statistics.mean, arrays["mu"].astype(np.float64))
    np.testing.assert_array_equal(reference.statistics.covariance, arrays["sigma"])
    assert reference.spatial is not None
    np.testing.assert_array_equal(reference.spatial.covariance, arrays["sigma_s"])
    np.testing.assert_array_equal(reference.vectors(), inception(arrays["arr_0"]).vectors)
    assert reference.statistics.count is None
    with pytest.raises(
        ValueError, match="holds 2048 numbers of 2015 Inception features, but evaluation/features gives"
    ):
        read_reference(path, Projected(), tmp_path / "cache", silent_progress)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mu": None}, "has no mu .it has arr_0, sigma, mu_s, sigma_s."),
        ({"sigma_s": None}, "has no sigma_s"),
        ({"sigma": np.eye(3)}, "has mu of shape .2048,. and sigma of shape .3, 3."),
        ({"mu": np.full(2048, np.nan)}, "mu or sigma of the reference .* is not finite"),
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, "has 64 numbers in mu, but the 2015 Inception gives 2048"),
        ({"mu_s": np.zeros(49 * 192), "sigma_s": np.eye(9)}, "has mu_s of shape"),
        ({"mu_s": np.zeros(9), "sigma_s": np.eye(9)}, "has 9 numbers in mu_s, but the 2015 Inception gives 2023"),
        ({"arr_0": np.zeros((6, 16, 16, 3), np.float32)}, "has arr_0 of float32 .6, 16, 16, 3., but images are uint8"),
        ({"arr_0": np.zeros((6, 3, 16, 16), np.uint8)}, "has arr_0 of uint8 .6, 3, 16, 16., but images are uint8"),
        ({"arr_0": np.zeros((6, 16, 20, 3), np.uint8)}, "has arr_0 of uint8 .6, 16, 20, 3., but images are uint8"),
        ({"arr_0": np.zeros((6, 16, 16), np.uint8)}, "has arr_0 of uint8 .6, 16, 16., but images are uint8"),
        ({"about": np.array("{")}, "about of the reference .* cannot be read"),
        ({"about": np.array("[1]")}, "about of the reference .* cannot be read"),
        ({"about": np.zeros(3)}, "about of the reference .* cannot be read"),
        (
            {"about": np.array('{"images": "many"}')},
            "about of the reference .* has images 'many', but .* valid integer",
        ),
        (
            {"about": np.array('{"images": 1}')},
            "about of the reference .* has images 1, but .* greater than or equal to 2",
        ),
        ({"about": np.array('{"num_classes": 2.5}')}, "about of the reference .* has num_classes 2.5"),
        (
            {"about": np.array('{"feature_extractor_hash": 3}')},
            "about of the reference .* has feature_extractor_hash 3",
        ),
        ({"sigma": -np.eye(2048)}, "has an eigenvalue of -1"),
    ],
)
def test_a_damaged_reference_is_refused(
    tmp_path: Path, inception: InceptionFeatures, change: dict[str, Any], words: str
) -> None:
    arrays = {name: array for name, array in (adm_arrays() | change).items() if array is not None}
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        _ = read_reference(tmp_path / "r.npz", inception, tmp_path / "cache", silent_progress).statistics.root


@pytest.mark.parametrize("name", ["mu", "sigma_s", "arr_0"])
def test_a_reference_with_flipped_bytes_is_refused(tmp_path: Path, inception: InceptionFeatures, name: str) -> None:
    """Flip bytes of one array and leave the archive's directory as it is, so that the shapes can be read."""
    path = tmp_path / "r.npz"
    np.savez(path, **adm_arrays())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(f"{name}.npy").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 600] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"{name} of the reference .* cannot be read"):
        read_reference(path, inception, tmp_path / "cache", silent_progress).vectors()


def test_a_truncated_reference_is_refused(tmp_path: Path, inception: InceptionFeatures) -> None:
    path = tmp_path / "r.npz"
    np.savez(path, **adm_arrays())
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"r\.npz cannot be read as an \.npz .*; is it complete"):
            read_reference(path, inception, tmp_path / "cache", silent_progress)


def test_a_reference_that_is_missing_or_no_npz_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no reference .*nowhere\.npz; fetch ADM's"):
        read_reference(tmp_path / "nowhere.npz", Projected(), tmp_path, silent_progress)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz"):
        read_reference(tmp_path / "cut.npz", Projected(), tmp_path, silent_progress)


def test_a_reference_of_another_extractor_size_or_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "r.npz")
    with pytest.raises(
        ValueError, match=r"of projections with hash aaaaaaaa, but evaluation/features gives .* bbbbbbbb"
    ):
        read_reference(tmp_path / "r.npz", Projected(hash="b" * 64), tmp_path, silent_progress)
    reference = read_reference(tmp_path / "r.npz", Projected(), tmp_path, silent_progress)
    reference.require(image_size=8, num_classes=5)
    with pytest.raises(ValueError, match="has images of side 8, but the generated images 16"):
        reference.require(image_size=16, num_classes=5)
    with pytest.raises(ValueError, match="has classes: 5, but the generated images 10"):
        reference.require(image_size=8, num_classes=10)


class TwoSizes(PatternSource):
    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        return example._replace(content=np.zeros((9, 9, 1), np.uint8)) if index == 3 else example


def test_an_image_of_another_size_in_the_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Image pattern-3 of pattern is 9x9, but data.image_size is 8"):
        SourceImages(TwoSizes(), 8).images(np.arange(5))


def test_a_reference_in_memory_knows_its_images() -> None:
    """Identify it by their content, so that the same number of images of another source is another reference."""
    reference = make_reference(PatternSource(), 8, Projected())
    reference.require(image_size=8, num_classes=5)
    with pytest.raises(ValueError, match="has classes: 5, but the generated images 10"):
        reference.require(image_size=8, num_classes=10)
    assert reference.hash == make_reference(PatternSource(), 8, Projected(hash="b")).hash
    assert reference.hash != make_reference(PatternSource(51), 8, Projected()).hash


def test_a_source_that_memory_may_not_hold_is_refused() -> None:
    with pytest.raises(
        ValueError, match="The 200000 images of pattern take 37 GiB, but a reference in memory may take 8"
    ):
        make_reference(PatternSource(200_000), 256, Projected())


def test_headers_are_read_without_the_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 4)), y=np.zeros(0, np.uint8), z=np.array("text"))
    found = {name: (header.shape, header.dtype) for name, header in headers_of(tmp_path / "a.npz").items()}
    assert found == {"x": ((3, 4), np.float64), "y": ((0,), np.uint8), "z": ((), np.dtype("<U4"))}
