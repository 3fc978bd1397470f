"""IDX files, MNIST's format, are read packed or plain; those that are missing, foreign or cut are refused."""

import gzip
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import InProcess
from idx_files import FASHION, gray_images, idx, needs_fashion, write_split

from data.idx import MAX_BYTES, FashionMnist, IdxImages
from data.manifest import Manifest
from data.sources import load_images
from evaluation.features.classifier import ClassifierFeatures
from launch.command.app import CONF

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def error_of(root: Path | str | None, kind: type[IdxImages] = IdxImages, split: str = "train") -> str:
    with pytest.raises(ValueError, match=r"\.$") as raised:
        kind(None if root is None else str(root), split)
    text = str(raised.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with 20 plain images to train on and 10 packed ones to test with."""
    write_split(tmp_path, "train", *gray_images(20), packed=False)
    write_split(tmp_path, "test", *gray_images(10, seed=1))
    return tmp_path


@pytest.mark.parametrize(("packed", "separator"), [(True, "-"), (False, "-"), (True, "."), (False, ".")])
def test_images_and_labels_are_those_that_were_written(tmp_path: Path, packed: bool, separator: str) -> None:
    images, labels = gray_images(12, size=5, num_classes=4)
    write_split(tmp_path, "test", images, labels, packed, separator)
    source = IdxImages(str(tmp_path), "test")
    assert (len(source), source.class_names) == (12, ["0", "1", "2", "3"])
    found, found_labels = load_images(source, 5)
    assert np.array_equal(found[..., 0], images)
    assert np.array_equal(found_labels, labels)
    assert source[7].source_id == "test-00007"
    pixels: Any = source[0].content
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 1


def test_packed_and_plain_files_have_one_fingerprint_and_each_change_another(tmp_path: Path) -> None:
    images, labels = gray_images(6, size=4)
    found = []
    for number, packed in enumerate((True, False)):
        write_split(tmp_path / str(number), "train", images, labels, packed)
        found.append(IdxImages(str(tmp_path / str(number))).fingerprint)
    assert found[0] == found[1]
    others = [(images + 1, labels), (images, labels[::-1].copy()), (images.reshape(6, 2, 8), labels)]
    for number, (pixels, classes) in enumerate(others):
        write_split(tmp_path / f"other{number}", "train", pixels, classes)
        found.append(IdxImages(str(tmp_path / f"other{number}")).fingerprint)
    assert len(set(found)) == 4


def test_a_missing_place_or_file_says_which_package_or_address_has_it(tmp_path: Path) -> None:
    for text in (error_of(tmp_path / "absent", FashionMnist), error_of(tmp_path, FashionMnist)):
        assert "There are no files in" in text
        assert "Debian's package dataset-fashion-mnist" in text
        assert "github.com/zalandoresearch/fashion-mnist" in text
    write_split(tmp_path, "train", *gray_images(10))
    text = error_of(tmp_path, FashionMnist, "test")
    assert "no IDX file t10k-images-idx3-ubyte.gz (or t10k-images-idx3-ubyte, " in text
    assert "among the 2 files" in text
    assert "dataset-fashion-mnist" in text
    assert "data.source.root" in error_of(tmp_path / "absent")
    assert "data.source.root is missing" in error_of(None)
    assert "data.split is 'dev', but the splits of IDX files are train, test" in error_of(tmp_path, split="dev")


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"has 0 bytes, but its header has 16"),
    "cut in the header": (idx(gray_images(20)[0])[:9], r"has 9 bytes, but its header has 16"),
    "cut": (idx(gray_images(20)[0])[:-5], r"has 15675 bytes of values, but its header states 20x28x28, .* 15680"),
    "longer": (idx(gray_images(20)[0]) + b"xyz", r"has 15683 bytes of values, .* which are 15680"),
    "labels": (idx(gray_images(20)[1]), r"begins with the number 2049, but an IDX file of images with 2051"),
    "of floats": (idx(gray_images(20)[0], magic=0x0D03), r"begins with the number 3331, but .* with 2051"),
    "a web page": (b"<!DOCTYPE html><html>", r"begins with the number 1008813135, but .* with 2051"),
    "no images": (idx(np.zeros((0, 28, 28), np.uint8)), r"states 0x28x28 values of a byte, but 1 to 1073741824"),
    "of no pixels": (idx(np.zeros((20, 0, 28), np.uint8)), r"states 20x0x28 values of a byte, but 1 to"),
    "huge": (
        idx(np.zeros((2, 2, 2), np.uint8), shape=(2**32 - 1,) * 3),
        r"states 4294967295x4294967295x4294967295 val",
    ),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [name for name in LIES if name != "a pointer"])
def test_a_file_that_is_cut_foreign_or_lies_is_refused_with_both_numbers(root: Path, name: str, packed: bool) -> None:
    content, words = LIES[name]
    (root / IMAGES).unlink()
    path = root / (f"{IMAGES}.gz" if packed else IMAGES)
    path.write_bytes(gzip.compress(content) if packed else content)
    text = error_of(root)
    assert str(path) in text
    words = words.replace("has 15683", "has at least 15681") if packed else words
    assert re.search(words, text), text


def test_a_pointer_a_link_to_nothing_and_a_huge_file_are_not_read(root: Path) -> None:
    path = root / IMAGES
    path.write_bytes(LIES["a pointer"][0])
    assert LIES["a pointer"][1] in error_of(root)
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES + 17)  # sparse
    assert f"has {MAX_BYTES + 17} bytes, but at most {MAX_BYTES} are read" in error_of(root)
    path.unlink()
    path.symlink_to(root / "nothing")
    assert "There is no IDX file" in error_of(root)


@pytest.mark.parametrize("damage", ["cut", "garbage", "checksum"])
def test_damaged_gzip_is_refused(root: Path, damage: str) -> None:
    path = root / "t10k-images-idx3-ubyte.gz"
    content = path.read_bytes()
    changed = {
        "cut": content[: len(content) // 2],
        "garbage": content[:40] + bytes(200) + content[240:],
        "checksum": content[:-8] + bytes(4) + content[-4:],
    }
    path.write_bytes(changed[damage])
    assert re.search(rf"{re.escape(str(path))} cannot be unpacked after \d+ bytes", error_of(root, split="test"))


def test_memory_grows_with_what_a_packed_file_has_and_not_with_what_it_states(root: Path) -> None:
    (root / IMAGES).unlink()
    few = idx(np.zeros((1, 28, 28), np.uint8), shape=(MAX_BYTES // 784, 28, 28))
    bomb = idx(np.zeros((1, 28, 28), np.uint8)) + bytes(2**27)
    for content, words in ((few, "has 784 bytes of values"), (bomb, "has at least 785 bytes of values")):
        (root / f"{IMAGES}.gz").write_bytes(gzip.compress(content))
        tracemalloc.start()
        text = error_of(root)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert words in text
        assert peak < 2**25  # a file is read in pieces of 2**24


def test_images_and_labels_of_unequal_length_are_refused(root: Path) -> None:
    (root / LABELS).write_bytes(idx(np.zeros(19, np.uint8)))
    assert f"has 20 images in {IMAGES}, but 19 labels in {LABELS}; fetch both again" in error_of(root)


def test_a_label_without_a_class_is_named_with_its_image(root: Path) -> None:
    (root / LABELS).write_bytes(idx(np.full(20, 10, np.uint8)))
    with pytest.raises(ValueError, match=r"Image train-00000 of fashion_mnist has label 10, but there are 10 classes"):
        load_images(FashionMnist(str(root)), 28)


def test_a_classifier_of_the_train_split_is_measured_on_the_test_split(root: Path, tmp_path: Path) -> None:
    write_split(root, "train", *gray_images(200), packed=False)
    train, test = (FashionMnist(str(root), split) for split in ("train", "test"))

    def features(**more: Any) -> ClassifierFeatures:
        return ClassifierFeatures(train, 28, str(tmp_path / "cache"), epochs=4, batch_size=10, **more)

    found = features(test_source=test)
    images, labels = load_images(test, 28)
    accuracy = float((found(images).classes == labels).mean())
    assert found.facts == {"classifier_accuracy": accuracy, "classifier_held_out": 10}
    assert accuracy > 0.5
    other = features()
    assert other.facts["classifier_held_out"] == 40
    assert other.hash != found.hash
    write_split(tmp_path / "four", "test", *gray_images(8, num_classes=4))
    four = IdxImages(str(tmp_path / "four"), "test")
    with pytest.raises(ValueError, match=r"test_source has 4 classes, but evaluation.features.source 10"):
        features(test_source=four)
    color = FashionMnist(str(root), "test")
    color._images = color._images.repeat(3, axis=3)
    with pytest.raises(ValueError, match=r"test_source has images of 3 channels, but .* of 1; give two splits"):
        features(test_source=color)


def test_features_of_many_images_are_computed_in_parts_that_change_none(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ClassifierFeatures(FashionMnist(str(root)), 28, str(tmp_path / "cache"), epochs=1)
    images, _ = load_images(FashionMnist(str(root)), 28)
    whole = found(images)
    monkeypatch.setattr("evaluation.features.classifier._PIXELS_AT_ONCE", 3 * 28 * 28)
    parts = found(images)
    assert whole.classes is not None
    assert np.array_equal(parts.classes, whole.classes)
    np.testing.assert_allclose(parts.vectors, whole.vectors, rtol=1e-4, atol=1e-5)


def test_jobs_take_the_split_and_measure_on_the_other(root: Path, in_process: InProcess) -> None:
    """Encode the train split, train on it, and compare with the test split; the command line's split wins."""
    folder, place = root.parent, f"data.source.root={root}"
    here = [f"data.shards={folder / 'shards'}"]
    in_process("encode", "data=fashion_mnist", place, *here)
    manifest = Manifest.load(str(folder / "shards"))
    assert (manifest.num_samples, manifest.spec.source) == (20, "fashion_mnist")
    record = json.loads((folder / "shards/data.json").read_text())
    assert record["data"]["source"]["split"] == "train"
    words = ["model.width=16", "model.depth=1", "model.num_heads=2", "model.patch_size=14", "runtime=cpu"]
    words += ["precision=fp32", "train/logger=none", "total_steps=2", "batch_size=8", "sample_every=null"]
    few = ["evaluation=fashion_mnist", "evaluation.num_images=10", "evaluation.features.epochs=1", "sampler.steps=2"]
    few += [f"evaluation.cache={folder / 'cache'}"]
    in_process("train", *here, *words, *few, "evaluate_every=2", f"run_dir={folder / 'run'}")
    (line,) = (folder / "run/evaluations.jsonl").read_text().splitlines()
    measured = json.loads(line)
    assert (measured["reference"], measured["reference_images"]) == ("fashion_mnist", 10)
    assert measured["classifier_held_out"] == 10
    in_process("reference", *here, "data.split=test", f"out={folder / 'test.npz'}", *few[2:3], few[-1], "runtime=cpu")
    about = json.loads(str(np.load(folder / "test.npz")["about"]))
    assert about["images"] == 10


def test_a_split_that_a_source_does_not_have_is_refused(in_process: InProcess) -> None:
    shown = in_process("encode", "data=digits", "data.split=test", expect=2)
    assert "data.split is test, but data.source has no splits; leave data.split out." in shown
    shown = in_process("encode", "data=fashion_mnist", "data.source.split=test", expect=2)
    assert "data.split is train, but data.source has test; leave data.source.split out." in shown


@needs_fashion
def test_fashion_mnist_of_debian_is_found_with_its_70000_images_in_10_equal_classes() -> None:
    for split, count in (("train", 60_000), ("test", 10_000)):
        source = FashionMnist(str(FASHION), split)
        assert len(source) == count
        labels = [source[index].label for index in range(count)]
        assert np.bincount(labels).tolist() == [count // 10] * 10
        pixels: Any = source[0].content
        assert pixels.shape == (28, 28, 1)
    assert [source.class_names[label] for label in labels[:4]] == ["Ankle boot", "Pullover", "Trouser", "Trouser"]
    assert "root: /usr/share/datasets" in (CONF / "data/source/fashion_mnist.yaml").read_text(encoding="utf-8")
