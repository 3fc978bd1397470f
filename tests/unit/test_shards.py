"""Encoding writes shards in the documented format, and damage to them is detected."""

import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import PatternSource, encode_pattern, silent_progress

from core.atomic import append_line, atomic_file, atomic_folder, remove_leftovers
from data.images import to_uint8, to_unit_range
from data.manifest import Manifest
from data.shard_tars import shard_bytes_per_sample
from data.shards import MappedShards
from data.verify import verify
from launch.command.app import CONF
from model.autoencoder import IdentityAutoencoder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def test_mapped_samples_are_the_source_images_in_both_orientations(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    shards, source = MappedShards(tmp_path), PatternSource()
    rows = np.arange(len(shards))
    plain = shards.gather(rows, np.zeros(50, dtype=bool))
    mirrored = shards.gather(rows, np.ones(50, dtype=bool))
    seen = set()
    for row in rows:
        index = int(str(shards.source_ids[row]).removeprefix("pattern-"))
        seen.add(index)
        expected = to_unit_range(source[index].content[np.newaxis])[0].numpy().astype(np.float16)
        np.testing.assert_array_equal(plain[row, :1], expected)
        np.testing.assert_array_equal(mirrored[row, :1], expected[..., ::-1])
        assert shards.labels[row] == source[index].label
    assert seen == set(range(50))


def test_encoding_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    encode_pattern(tmp_path / "a")
    encode_pattern(tmp_path / "b", batch_size=50)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_encoding_again_rewrites_just_what_is_damaged_or_missing(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "shard-000000.tar").unlink()
    damaged = tmp_path / "shard-000002.tar"
    damaged.write_bytes(damaged.read_bytes()[:-700] + b"x" * 700)
    untouched = (tmp_path / "shard-000001.tar").stat().st_mtime_ns
    encode_pattern(tmp_path)
    assert contents(tmp_path) == before
    assert (tmp_path / "shard-000001.tar").stat().st_mtime_ns == untouched


def test_any_webdataset_reader_opens_the_shards(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    shards = MappedShards(tmp_path)
    urls = [str(tmp_path / shard.name) for shard in shards.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 50
    for row, sample in enumerate(samples):
        assert sample["__key__"] == f"{row:08d}"
        assert sample["cls"] == shards.labels[row]
        gathered = [shards.gather(np.array([row]), np.array([flip]))[0] for flip in (False, True)]
        np.testing.assert_array_equal(sample["moments.npy"], np.stack(gathered))


def test_the_planned_size_of_a_sample_is_its_stride(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    with np.load(tmp_path / "index.npz") as index:
        assert index["layout"][0, 1] == shard_bytes_per_sample(2 * 2 * 8 * 8)


def test_classes_are_mixed_within_a_shard(digits: Path) -> None:
    labels = MappedShards(digits).labels[:256]
    assert np.bincount(labels, minlength=10).min() >= 10
    assert (np.diff(labels) != 0).mean() > 0.7


def test_shards_hold_no_clock_and_no_pickle(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert {member.mtime for member in tar} == {0}
    with (
        np.load(tmp_path / "index.npz", allow_pickle=False) as index,
        np.load(tmp_path / "labels.npz", allow_pickle=False) as labels,
    ):
        assert set(index.files) == {"label", "source_id", "layout"}
        assert set(labels.files) == {"label", "layout"}
        for name in labels.files:
            np.testing.assert_array_equal(labels[name], index[name])


def test_training_reads_the_labels_without_the_names_of_images(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    (tmp_path / "index.npz").unlink()
    shards = MappedShards(tmp_path)
    assert shards.labels_of(np.array([49, 0])).tolist() == [shards.labels[49], shards.labels[0]]
    with pytest.raises(ValueError, match=r"index\.npz is missing, but the manifest lists it"):
        _ = shards.source_ids


def test_a_folder_of_an_earlier_version_is_read_and_completed_and_keeps_its_identity(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    new, now = contents(tmp_path), MappedShards(tmp_path)
    replace(Manifest.load(tmp_path), labels_sha256=None).save(tmp_path)
    (tmp_path / "labels.npz").unlink()
    assert "labels_sha256" not in (tmp_path / "manifest.json").read_text()
    old = MappedShards(tmp_path)
    assert old.manifest.hash == now.manifest.hash
    np.testing.assert_array_equal(old.labels, now.labels)
    assert old.source_ids.tolist() == now.source_ids.tolist()
    assert verify(tmp_path, silent_progress)[1] == []
    encode_pattern(tmp_path)
    assert contents(tmp_path) == new


def test_manifest_statistics_are_those_of_the_latents(tmp_path: Path) -> None:
    manifest = encode_pattern(tmp_path)
    shards = MappedShards(tmp_path)
    values = np.stack([shards.gather(np.arange(50), np.full(50, flip))[:, 0] for flip in (False, True)])
    assert manifest.latent_mean[0] == pytest.approx(values.astype(np.float64).mean(), abs=1e-3)
    assert manifest.latent_std[0] == pytest.approx(values.astype(np.float64).std(), rel=1e-3)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000001.tar is missing"):
        MappedShards(tmp_path)


def test_a_damaged_shard_is_named_with_both_checksums(tmp_path: Path) -> None:
    manifest = encode_pattern(tmp_path)
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=rf"shard-000001.tar is damaged: .*{manifest.shards[1].sha256}.* the file has"):
        MappedShards(tmp_path)


def test_a_truncated_shard_is_named_with_both_sizes_without_reading_it(tmp_path: Path) -> None:
    manifest = encode_pattern(tmp_path)
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(ValueError, match=f"says {manifest.shards[1].bytes} bytes, the file has 1024"):
        MappedShards(tmp_path, verify_checksums=False)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 99}'])
def test_an_unreadable_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json"):
        Manifest.load(tmp_path)


def test_shards_of_another_plan_are_not_overwritten(tmp_path: Path) -> None:
    encode_pattern(tmp_path)
    with pytest.raises(ValueError, match="flip is True and not False"):
        encode_pattern(tmp_path, flip=False)


def test_images_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is 8x8, but data.image_size is 16"):
        encode_pattern(tmp_path, image_size=16)
    with pytest.raises(ValueError, match="Image pattern-7 of pattern has label 99, but there are 5 classes"):
        encode_pattern(tmp_path, PatternSource(bad_label_at=7))


def test_labels_outside_the_classes_are_refused_when_reading(tmp_path: Path) -> None:
    manifest = encode_pattern(tmp_path)
    assert manifest.spec.num_classes == 5
    fewer = replace(manifest.spec, num_classes=3)
    replace(manifest, spec=fewer, class_names=manifest.class_names[:3]).save(tmp_path)
    with pytest.raises(ValueError, match=r"has label [34], but the manifest has 3 classes"):
        MappedShards(tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write_file() -> None:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    def write_folder() -> None:
        with atomic_folder(tmp_path / "b") as folder:
            (folder / "c").write_text("half")
            raise KeyboardInterrupt

    for write in (write_file, write_folder):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_is_killed_never_shows_half_a_folder(tmp_path: Path) -> None:
    """Kill a process that keeps writing folders at random moments; every folder that appears is complete."""
    program = (
        "import itertools, sys\n"
        "from pathlib import Path\n"
        "from core.atomic import atomic_folder\n"
        "for number in itertools.count():\n"
        "    with atomic_folder(Path(sys.argv[1]) / f'{number}') as aside:\n"
        "        for name in 'abc':\n"
        "            (aside / name).write_bytes(b'x' * 100_000)\n"
        "    print(number, flush=True)\n"
    )
    random = np.random.default_rng(0)
    for attempt in range(5):
        target = tmp_path / str(attempt)
        words = [sys.executable, "-c", program, str(target)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=CONF.parent) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(random.random() * 0.05)
            process.kill()
        for folder in target.iterdir():
            if not folder.name.startswith("."):
                assert {path.name: path.stat().st_size for path in folder.iterdir()} == dict.fromkeys("abc", 100_000)
        remove_leftovers(target)
        assert not list(target.glob(".*"))


def test_shards_of_an_unfinished_other_plan_do_not_stay(tmp_path: Path) -> None:
    encode_pattern(tmp_path, samples_per_shard=5)
    (tmp_path / "manifest.json").unlink()
    encode_pattern(tmp_path, samples_per_shard=25)
    assert sorted(path.name for path in tmp_path.glob("shard-*.tar")) == ["shard-000000.tar", "shard-000001.tar"]


def test_appending_after_a_cut_line_takes_the_cut_line_away(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, "one")
    with path.open("a") as file:
        file.write('{"tw')
    append_line(path, "two")
    append_line(path, "three")
    assert path.read_text() == "one\ntwo\nthree\n"


def test_uint8_survives_the_way_to_the_network_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(to_uint8(to_unit_range(levels)), levels)


def test_channels_of_the_autoencoder_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="configured for 3 channels, but the images have 1"):
        encode_pattern(tmp_path, autoencoder=IdentityAutoencoder(3))
