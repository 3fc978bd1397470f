"""The cached classifier of a job is trained again to the same weights if it is damaged in any way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PatternSource
from damage import DAMAGES, within
from safetensors.torch import save
from test_kept import told

from core.records import seal
from evaluation.features.classifier import ClassifierFeatures


def classifier(cache: Path, **changes: Any) -> ClassifierFeatures:
    return ClassifierFeatures(PatternSource(), 8, str(cache), **{"epochs": 1, **changes})


def facts_of(found: ClassifierFeatures) -> tuple[str, dict[str, float], bytes]:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    return found.hash, found.facts, found(images).vectors.tobytes()


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "facts.json"])
def test_a_damaged_classifier_is_trained_again_to_the_same(
    tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = facts_of(classifier(tmp_path))
    path = next(tmp_path.glob(f"classifier-*/{name}"))
    DAMAGES[kind](path)
    with within(30):
        assert facts_of(classifier(tmp_path)) == expected
    (line,) = told(capsys)
    assert str(path.parent) in line
    assert facts_of(classifier(tmp_path)) == expected
    assert told(capsys) == []


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "junk", "missing"])
def test_a_classifiers_folder_that_is_empty_or_none_is_replaced(tmp_path: Path, kind: str) -> None:
    expected = facts_of(classifier(tmp_path))
    folder = next(path for path in tmp_path.glob("classifier-*") if path.is_dir())
    DAMAGES["a folder"](folder)
    if kind != "a folder":
        folder.rmdir()
        folder.touch()
        DAMAGES[kind](folder)
    with within(30):
        assert facts_of(classifier(tmp_path)) == expected
        assert facts_of(classifier(tmp_path)) == expected
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classifier_accuracy": 1.5}, "classifier_accuracy is 1.5, but"),
        ({"classifier_accuracy": "0.9"}, "classifier_accuracy is '0.9', but"),
        ({"classifier_accuracy": None}, "classifier_accuracy is None, but"),
        ({"classifier_held_out": 2.5}, "classifier_held_out is 2.5, but"),
        ({"classifier_held_out": True}, "classifier_held_out is True, but"),
        ({"weights_sha256": "../x"}, "weights_sha256 is '../x', but"),
        ({"identity": "0" * 64}, "is of other images or settings"),
        ({"more": 1}, "it has a field more, which this program does not know"),
    ],
)
def test_facts_of_a_classifier_that_cannot_be_are_not_recorded(
    tmp_path: Path, change: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reject impossible facts even if their hash is right."""
    expected = classifier(tmp_path).facts
    path = next(tmp_path.glob("classifier-*/facts.json"))
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "record_sha256"}
    path.write_text(json.dumps(seal({**content, **change})))
    assert classifier(tmp_path).facts == expected
    (line,) = told(capsys)
    assert words in line


def test_weights_of_another_network_are_not_taken_for_a_classifiers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = facts_of(classifier(tmp_path))
    wide = classifier(tmp_path / "wide", num_features=8)
    mine, other = (next(cache.glob("classifier-*/facts.json")) for cache in (tmp_path, tmp_path / "wide"))
    (mine.parent / "model.safetensors").write_bytes((other.parent / "model.safetensors").read_bytes())
    content = {key: value for key, value in json.loads(mine.read_text()).items() if key != "record_sha256"}
    mine.write_text(json.dumps(seal({**content, "weights_sha256": wide.hash})))
    assert facts_of(classifier(tmp_path)) == expected
    assert "model.safetensors is damaged: Error(s) in loading state_dict" in told(capsys)[0]


def test_a_classifiers_weights_are_the_bytes_of_safetensors_and_as_readable_as_other_files(tmp_path: Path) -> None:
    """Check the bytes, since records contain their hash, which must not change with the program."""
    found = classifier(tmp_path)
    path = next(tmp_path.glob("classifier-*/model.safetensors"))
    assert path.read_bytes() == save(found._network.state_dict())
    (tmp_path / "neighbour").touch()
    assert {file.stat().st_mode for file in path.parent.iterdir()} == {(tmp_path / "neighbour").stat().st_mode}


def test_a_classifier_of_too_few_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs at least 5 images, but there are 4"):
        ClassifierFeatures(PatternSource(4, num_classes=2), 8, str(tmp_path), epochs=1)
