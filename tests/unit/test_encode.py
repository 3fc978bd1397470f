"""The encode job handles faulty images and folders, verifies and repairs, and imports latents of other programs."""

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from conftest import PatternSource, encode_pattern, image_encoding, silent_progress
from pictures import encoded, make_autoencoder, make_image_folder, photo
from test_shards import contents

from data.encode import Workers, encode
from data.encodings import ImportLatents
from data.image_folder import ImageFolder
from data.images import CenterCrop, ExactSize, Preparation, to_unit_range
from data.manifest import Manifest
from data.shards import MappedShards
from data.tars import LatentTars
from data.verify import verify
from model.autoencoder import IdentityAutoencoder
from model.autoencoder_kl import DiffusersAutoencoder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> DiffusersAutoencoder:
    return DiffusersAutoencoder("tiny", str(make_autoencoder(tmp_path_factory.mktemp("vae") / "x")), 0.18215)


def encode_folder(root: Path, folder: Path, autoencoder: Any, **changes: Any) -> Any:
    settings = {"name": "animals", "samples_per_shard": 8, "batch_size": 5, "seed": 0} | changes
    encoding = image_encoding(autoencoder, 32, flip=True, crop=CenterCrop())
    return encode(ImageFolder(str(root)), encoding, folder, progress=silent_progress, **settings)


def test_stored_moments_are_the_autoencoders_of_the_cropped_and_of_the_mirrored_image(
    tmp_path: Path, autoencoder: DiffusersAutoencoder
) -> None:
    root = make_image_folder(tmp_path / "images", per_class=4)
    encode_folder(root, tmp_path / "shards", autoencoder)
    shards, source = MappedShards(tmp_path / "shards"), ImageFolder(str(root))
    for row in range(12):
        index = [source[i].source_id for i in range(12)].index(str(shards.source_ids[row]))
        pixels = to_unit_range(Preparation(32, CenterCrop())(source[index].content)[np.newaxis])
        for flip in (False, True):
            expected = autoencoder.moments(pixels.flip(3) if flip else pixels)[0].numpy()
            found = shards.gather(np.array([row]), np.array([flip]))[0]
            np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2e-3, atol=2e-3)
    classes = json.loads((tmp_path / "shards/classes.json").read_text())
    assert classes == {"0": "ant", "1": "bee", "2": "cat"}


def test_unreadable_images_are_set_aside_with_their_reasons_and_change_nothing_else(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images")
    sound = encode_folder(root, tmp_path / "sound", IdentityAutoencoder(3))
    (root / "ant/003.JPEG").write_bytes(b"")
    (root / "bee/003.JPEG").write_bytes(b"garbage")
    (root / "cat/003.JPEG").write_bytes(encoded(photo(23))[:-200])
    manifest = encode_folder(root, tmp_path / "faulty", IdentityAutoencoder(3), max_skipped_fraction=0.1)
    lines = [json.loads(line) for line in (tmp_path / "faulty/skipped.jsonl").read_text().splitlines()]
    reasons = {line["source_id"]: line["reason"] for line in lines}
    assert reasons.keys() == {"ant/003.JPEG", "bee/003.JPEG", "cat/003.JPEG"}
    assert "empty" in reasons["ant/003.JPEG"]
    assert "cannot identify" in reasons["bee/003.JPEG"]
    assert "truncated" in reasons["cat/003.JPEG"].lower()
    assert (manifest.num_samples, manifest.num_skipped) == (27, 3)
    assert (sound.num_samples, sound.num_skipped) == (30, 0)
    one, two = MappedShards(tmp_path / "sound"), MappedShards(tmp_path / "faulty")
    kept = np.array([row for row in range(30) if str(one.source_ids[row]) not in reasons])
    assert one.source_ids[kept].tolist() == two.source_ids.tolist()
    flips = np.arange(27) % 2 == 0
    np.testing.assert_array_equal(one.gather(kept, flips), two.gather(np.arange(27), flips))


def test_too_many_unreadable_images_fail_the_job_and_are_named(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images")
    for number in range(4):
        (root / f"bee/00{number}.JPEG").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"4 of 30 images cannot be read.*max_skipped_fraction=0.1 allows"):
        encode_folder(root, tmp_path / "shards", IdentityAutoencoder(3), max_skipped_fraction=0.1)
    assert len((tmp_path / "shards/skipped.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "shards/manifest.json").exists()
    assert encode_folder(root, tmp_path / "shards", IdentityAutoencoder(3), max_skipped_fraction=0.2).num_skipped == 4


def test_a_shard_of_which_no_image_can_be_read_is_empty_and_harmless(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images", per_class=4)
    settings = {"samples_per_shard": 1, "max_skipped_fraction": 0.5}
    (root / "ant/001.JPEG").write_bytes(b"garbage")
    manifest = encode_folder(root, tmp_path / "shards", IdentityAutoencoder(3), **settings)
    assert sorted(shard.count for shard in manifest.shards) == [0] + [1] * 11
    shards = MappedShards(tmp_path / "shards")
    assert shards.gather(np.arange(11), np.zeros(11, dtype=bool)).shape == (11, 6, 32, 32)
    assert not verify(tmp_path / "shards", silent_progress)[1]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, world: int) -> None:
    encode_pattern(tmp_path / "one")
    for rank in [*range(1, world), 0]:  # the first process waits for the others
        workers = Workers(rank, world, threads=1 + rank % 2)
        manifest = encode_pattern(tmp_path / "many", workers=workers)
        assert (manifest is None) == (rank != 0)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_two_jobs_in_one_folder_are_refused(tmp_path: Path) -> None:
    class Nosy(PatternSource):
        def __getitem__(self, index: int) -> Any:
            if index == 0:
                with pytest.raises(ValueError, match="Another `ditscale encode` is running in"):
                    encode_pattern(tmp_path)
            return super().__getitem__(index)

    encode_pattern(tmp_path, Nosy())


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"flip": False}, "flip is True and not False"),
        ({"crop": CenterCrop()}, "crop is 'none' and not 'center'"),
        ({"image_size": 16, "source": PatternSource(size=16)}, "image_size is 8 and not 16"),
        ({"name": "other"}, "source is 'pattern' and not 'other'"),
        ({"seed": 1}, "the images, the seed or the shard size differ"),
        ({"samples_per_shard": 17}, "the images, the seed or the shard size differ"),
        ({"source": PatternSource(count=51)}, "the images, the seed or the shard size differ"),
    ],
)
def test_a_folder_of_another_plan_is_refused_and_says_what_differs(
    tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    encode_pattern(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"already holds other shards: {difference}"):
        encode_pattern(tmp_path, **changes)
    assert contents(tmp_path) == before


def test_a_folder_of_another_autoencoder_is_refused(tmp_path: Path, autoencoder: DiffusersAutoencoder) -> None:
    root = make_image_folder(tmp_path / "images", per_class=2)
    encode_folder(root, tmp_path / "shards", autoencoder)
    folder = str(make_autoencoder(tmp_path / "other", seed=1))
    for other, difference in [
        (DiffusersAutoencoder("tiny", folder, 0.18215), "autoencoder_revision is"),
        (IdentityAutoencoder(3), "autoencoder is 'tiny' and not 'identity'"),
    ]:
        with pytest.raises(ValueError, match=difference):
            encode_folder(root, tmp_path / "shards", other)


def test_values_that_are_not_finite_stop_the_job_and_name_the_image(tmp_path: Path) -> None:
    class Broken(IdentityAutoencoder):
        precision = "bf16"

        def moments(self, images: torch.Tensor) -> torch.Tensor:
            return super().moments(images) / (images[:, :1] != images.flatten().min())

    with pytest.raises(ValueError, match=r"not finite for pattern-\d+; try data.autoencoder.precision=fp32"):
        encode_pattern(tmp_path, autoencoder=Broken(1))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-512])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "cut", "bit"])
def test_verify_names_just_what_is_damaged_and_encoding_again_mends_it(tmp_path: Path, how: str) -> None:
    encode_pattern(tmp_path)
    before = contents(tmp_path)
    assert not verify(tmp_path, silent_progress)[1]
    damage(tmp_path / "shard-000001.tar", how)
    damage(tmp_path / "shard-000003.tar", how)
    damages = verify(tmp_path, silent_progress)[1]
    assert [found.file for found in damages] == ["shard-000001.tar", "shard-000003.tar"]
    words = {"missing": "is missing", "cut": "bytes, not", "bit": "sha256"}
    assert all(words[how] in found.reason for found in damages)
    encode_pattern(tmp_path)
    assert contents(tmp_path) == before


def test_verify_looks_into_shards_whose_checksum_was_made_to_fit(tmp_path: Path) -> None:
    """Read values and labels, since a matching manifest alone proves nothing."""
    from core.reading import sha256_of

    def rewritten(change: Any) -> list[str]:
        encode_pattern(tmp_path)
        path = tmp_path / "shard-000000.tar"
        with tarfile.open(path) as tar:
            samples = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for name in [name for name in samples if name.endswith(".cls")]:
                key = name.removesuffix(".cls")
                values = np.frombuffer(samples[f"{key}.moments.npy"][128:], np.float16).reshape(2, 2, 8, 8)
                writer.write({"__key__": key, **change(values.copy(), int(samples[name]))})
        manifest = Manifest.load(tmp_path)
        entry = replace(manifest.shards[0], sha256=sha256_of(path), bytes=path.stat().st_size)
        replace(manifest, shards=[entry, *manifest.shards[1:]]).save(tmp_path)
        path.with_suffix(".json").unlink()  # it would say that these are other bytes
        found = [f"{damage.file} {damage.reason}" for damage in verify(tmp_path, silent_progress)[1]]
        for file in tmp_path.iterdir():
            file.unlink()
        return found

    assert rewritten(lambda values, label: {"moments.npy": values, "cls": label}) == []
    (found,) = rewritten(lambda values, label: {"moments.npy": values * np.float16(np.inf), "cls": label})
    assert "values that are not finite" in found
    found = rewritten(lambda values, label: {"moments.npy": values, "cls": (label + 1) % 5})
    assert found == [f"{name} has other labels than shard-000000.tar" for name in ("index.npz", "labels.npz")]
    (found,) = rewritten(lambda values, label: {"moments.npy": values[:1], "cls": label})
    assert "has a sample float16(1, 2, 8, 8), not float16(2, 2, 8, 8)" in found
    (found,) = rewritten(lambda values, label: {"moments.npy": values + np.float16(1), "cls": label})
    assert "manifest.json has latent_mean" in found


def write_latents(path: Path, latents: np.ndarray) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for index, latent in enumerate(latents):
            writer.write({"__key__": f"{index:05d}", "npy": latent, "cls": index % 3})


@pytest.mark.parametrize(("has_variance", "scaled"), [(False, False), (False, True), (True, False), (True, True)])
def test_latents_of_another_program_are_imported_with_the_meaning_they_had(
    tmp_path: Path, autoencoder: DiffusersAutoencoder, has_variance: bool, scaled: bool
) -> None:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((12, 8 if has_variance else 4, 16, 16)).astype(np.float32)
    write_latents(tmp_path / "foreign.tar", latents)
    encoding = ImportLatents(autoencoder, Preparation(32, CenterCrop()), False, torch.device("cpu"), scaled=scaled)
    settings = {"name": "foreign", "samples_per_shard": 5, "batch_size": 4, "seed": 0}
    encode(LatentTars(str(tmp_path)), encoding, tmp_path / "shards", progress=silent_progress, **settings)
    shards = MappedShards(tmp_path / "shards")
    assert not shards.manifest.spec.flip
    moments = torch.from_numpy(shards.gather(np.arange(12), np.zeros(12, dtype=bool)))
    noise = torch.from_numpy(rng.standard_normal((12, 4, 16, 16)).astype(np.float32))
    found = autoencoder.draw(moments, noise)
    for row in range(12):
        values = torch.from_numpy(latents[int(str(shards.source_ids[row]).split("/")[1])])
        expected = values[:4] * (1.0 if scaled else 0.18215)
        if has_variance:
            expected = expected + torch.exp(values[4:] / 2) * noise[row] * (1.0 if scaled else 0.18215)
        torch.testing.assert_close(found[row], expected, rtol=5e-3, atol=5e-3)
        assert shards.labels[row] == int(str(shards.source_ids[row]).split("/")[1]) % 3


def test_latents_of_another_shape_or_with_flips_are_refused(tmp_path: Path, autoencoder: DiffusersAutoencoder) -> None:
    write_latents(tmp_path / "foreign.tar", np.zeros((3, 4, 8, 8), np.float32))
    preparation, cpu = Preparation(32, ExactSize()), torch.device("cpu")
    with pytest.raises(ValueError, match=r"data.flip is true, but imported latents have 1 orientation"):
        ImportLatents(autoencoder, preparation, True, cpu)
    encoding = ImportLatents(autoencoder, preparation, False, cpu)
    settings = {"name": "foreign", "samples_per_shard": 5, "batch_size": 4, "seed": 0}
    with pytest.raises(
        ValueError, match=r"has shape \(4, 8, 8\), but the latents of tiny at 32 pixels have \(4, 16, 16\)"
    ):
        encode(LatentTars(str(tmp_path)), encoding, tmp_path / "shards", progress=silent_progress, **settings)


def test_the_bar_ends_at_the_images_of_all_processes_also_when_the_others_end_last(tmp_path: Path) -> None:
    """Let the second process work while the first, which polls it once a second, has finished its last batch."""
    counted: list[int] = []

    class Bar:
        def update(self, n: int = 1) -> None:
            counted.append(n)
            if sum(counted) == 8 + 8 + 8 + 2:  # shards 0, 2, 4 and 6
                work(1, silent_progress)

    @contextmanager
    def progress(label: str, done: int, total: int, unit: str) -> Iterator[Bar]:
        assert (label, done, total, unit) == ("encode", 0, 50, "img")
        yield Bar()

    def work(rank: int, bar: Any) -> None:
        encoding = image_encoding(IdentityAutoencoder(1), 8, flip=True, crop=ExactSize())
        settings: dict[str, Any] = {"name": "pattern", "samples_per_shard": 8, "batch_size": 8, "seed": 0}
        encode(PatternSource(), encoding, tmp_path, progress=bar, workers=Workers(rank, 2), **settings)

    work(0, progress)
    assert sum(counted) == 50
