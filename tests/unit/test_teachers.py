"""Shards store a teacher's features of both orientations beside the latents, and stay as they are without one."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import webdataset
from conftest import InProcess, PatternSource, encode_pattern, resealed, silent_progress
from PIL import Image
from small_dinov2 import write_small_dinov2
from small_teacher import DIM, TOKENS, encode_with_teacher, small_teacher
from test_batches import make

from core.batch import FEATURES, WEIGHT
from data.manifest import Manifest, TeacherSpec
from data.shards import MappedShards
from data.teachers import DINOv2Teacher
from data.verify import verify


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> DINOv2Teacher:
    return small_teacher(tmp_path_factory.mktemp("teacher") / "dinov2")


@pytest.fixture(scope="module")
def encoded(teacher: DINOv2Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    encode_with_teacher(folder, teacher)
    return folder


def expected_features(folder: Path, pixels: np.ndarray) -> torch.Tensor:
    """Return the patch tokens of transformers' own DINOv2 for one gray image [H, W, 1] uint8."""
    from transformers import Dinov2Model

    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resized = F.interpolate((image - mean) / std, (28, 28), mode="bicubic")
    with torch.no_grad():
        tokens: torch.Tensor = Dinov2Model.from_pretrained(folder)(resized).last_hidden_state[0, 1:]
    return tokens


def test_stored_features_are_the_teachers_of_the_cropped_and_of_the_mirrored_image(
    encoded: Path, tmp_path: Path
) -> None:
    shards, source = MappedShards(encoded), PatternSource()
    write_small_dinov2(tmp_path / "dinov2")
    for row in (0, 20, 49):
        pixels = source[int(str(shards.source_ids[row]).removeprefix("pattern-"))].content
        assert not isinstance(pixels, bytes)
        for flip in (False, True):
            view = pixels[:, ::-1].copy() if flip else pixels
            out = np.empty((1, TOKENS, DIM), np.float16)
            found = shards.gather_features(np.array([row]), np.array([flip]), out)[0]
            expected = expected_features(tmp_path / "dinov2", view).numpy()
            np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2e-3, atol=2e-3)
    whole = shards.gather_features(np.array([0, 0]), np.array([False, True]), np.empty((2, TOKENS, DIM), np.float16))
    assert not np.allclose(whole[0], whole[1], atol=0.05)  # else the mirrored image would prove nothing


def test_features_change_no_latent_label_or_name_and_any_webdataset_reader_sees_them(
    encoded: Path, sound: Path
) -> None:
    with_features, without = MappedShards(encoded), MappedShards(sound)
    rows, flips = np.arange(50), np.arange(50) % 2 == 0
    assert with_features.gather(rows, flips).tobytes() == without.gather(rows, flips).tobytes()
    assert with_features.labels.tolist() == without.labels.tolist()
    assert with_features.source_ids.tolist() == without.source_ids.tolist()
    tars = str(encoded / "shard-{000000..000003}.tar")
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    found = np.stack([sample["teacher.npy"] for sample in samples])
    assert (found.dtype, found.shape) == (np.float16, (50, 2, TOKENS, DIM))
    out = np.empty((50, TOKENS, DIM), np.float16)
    assert with_features.gather_features(rows, flips, out).tobytes() == found[rows, flips.astype(int)].tobytes()


def test_shards_without_a_teacher_have_the_bytes_of_earlier_versions(tmp_path: Path) -> None:
    manifest = encode_pattern(tmp_path)
    assert manifest.hash == "f581a4da7d9e32585a2d3dec9af62a72299446b069b2797fded08cdec976fb9f"
    assert manifest.plan_hash == "201978e238a445b952caaf9e644ffa370d1a1753c49a20fef285c9aa68dc8e3d"
    for name, start in (
        ("manifest.json", "52f0f0a7762697b8"),
        ("index.npz", "32590a030401964d"),
        ("shard-000000.json", "54cd468feb14d425"),
        ("shard-000000.tar", "389625a652f053b1"),
        ("shard-000003.tar", "75f984e157c2b3b4"),
    ):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest().startswith(start), name


def test_the_manifest_names_the_teacher_and_another_is_refused_in_the_same_folder(
    encoded: Path, teacher: DINOv2Teacher, tmp_path: Path
) -> None:
    found = Manifest.load(encoded).teacher
    assert found == teacher.spec() == TeacherSpec("dinov2", found.revision, 28, TOKENS, DIM)
    copy = shutil.copytree(encoded, tmp_path / "copy")
    before = (copy / "manifest.json").read_bytes()
    encode_with_teacher(copy, teacher)  # keeps all
    assert (copy / "manifest.json").read_bytes() == before
    with pytest.raises(
        ValueError, match=r"already holds other shards: teacher is dinov2 .*\(4 tokens of 32\) and not none"
    ):
        encode_pattern(copy)


def test_verify_finds_damage_in_features_and_a_repair_writes_the_same_bytes(
    encoded: Path, teacher: DINOv2Teacher, tmp_path: Path
) -> None:
    copy = shutil.copytree(encoded, tmp_path / "copy")
    assert verify(copy, silent_progress)[1] == []
    path = copy / "shard-000002.tar"
    whole = path.read_bytes()
    place = whole.index(b"teacher.npy") + 512 + 128
    path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    assert [damage.file for damage in verify(copy, silent_progress)[1]] == ["shard-000002.tar"]
    encode_with_teacher(copy, teacher)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("field", "words"),
    [("dim", r"has features float16\(2, 4, 32\), not float16\(2, 4, 31\)"), (None, "has features of a teacher, but")],
)
def test_features_that_are_not_the_manifests_are_named(
    encoded: Path, tmp_path: Path, field: str | None, words: str
) -> None:
    copy = shutil.copytree(encoded, tmp_path / "copy")
    for path in copy.glob("shard-*.json"):
        path.unlink()
    spec = Manifest.load(copy).teacher
    assert spec is not None
    changed = {**vars(spec), field: 31} if field else None
    resealed(copy / "manifest.json", teacher=changed)
    reasons = [damage.reason for damage in verify(copy, silent_progress)[1]]
    assert len(reasons) == 4
    assert all(re.search(words, reason) for reason in reasons)
    if field:
        with pytest.raises(ValueError, match=r"has no features float16\(2, 4, 31\) behind sample"):
            MappedShards(copy).gather(np.array([0]), np.array([False]))


def test_a_batch_has_the_features_of_the_orientation_that_each_sample_has(encoded: Path) -> None:
    shards = MappedShards(encoded)
    batch, plain = make(shards, target_steps=3).batch(2), make(shards).batch(2)
    assert plain.targets == {}
    assert torch.equal(batch.x_0, plain.x_0)
    assert torch.equal(batch.targets[WEIGHT], torch.ones(12))
    found: list[bool] = []
    for row, flip in ((row, flip) for row in range(50) for flip in (False, True)):
        rows, flips = np.array([row]), np.array([flip])
        moments = torch.from_numpy(shards.gather(rows, flips))
        features = torch.from_numpy(shards.gather_features(rows, flips, np.empty((1, TOKENS, DIM), np.float16)))
        same = [torch.equal(sample, moments[0, :1].float()) for sample in batch.x_0]
        for place in np.flatnonzero(same):
            assert torch.equal(batch.targets[FEATURES][place], features[0])
            found.append(flip)
    assert len(found) == 12
    assert set(found) == {False, True}
    parts = [make(shards, rank, 2, target_steps=3).batch(2) for rank in range(2)]
    for name, value in batch.targets.items():
        assert torch.equal(torch.cat([part.targets[name] for part in parts]), value)


def test_after_the_last_step_with_targets_batches_have_their_shape_and_no_weight(encoded: Path) -> None:
    late = make(MappedShards(encoded), target_steps=3).batch(3)
    assert late.targets[FEATURES].shape == (12, TOKENS, DIM)
    assert not late.targets[FEATURES].any()
    assert not late.targets[WEIGHT].any()


def test_encode_and_a_repair_by_the_settings_beside_the_shards(tmp_path: Path, in_process: InProcess) -> None:
    write_small_dinov2(tmp_path / "dinov2")
    words = ["data/teacher=dinov2", "teacher.pretrained=dinov2", "teacher.image_size=28", "data.shards=shards"]
    (tmp_path / "photos/a").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16), (40 * number, 9, 99)).save(tmp_path / f"photos/a/{number}.png")
    source = ["data=folder", "data.source.root=photos", "data.name=photos", "data.image_size=16"]
    source += ["model/autoencoder=identity", "data.autoencoder.channels=3"]
    in_process("encode", *source, *words, "device=cpu")
    assert Manifest.load(tmp_path / "shards").teacher is not None
    path = tmp_path / "shards/shard-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    in_process("verify", "data.shards=shards", "repair=true", "device=cpu")
    assert path.read_bytes() == whole
    shown = in_process("encode", *source, *words, "teacher.image_size=30", "device=cpu", expect=2)
    assert "teacher.image_size 30 is not a multiple of 14, the teacher's patch size; use 28" in shown
    shown = in_process("encode", *source, *words, "data/encoding=latents", "data.flip=false", "device=cpu", expect=2)
    assert "data/encoding=latents has none" in shown
    shown = in_process("encode", *source, *words[:1], "data.shards=x", "teacher.pretrained=no/such", expect=2)
    assert "The teacher 'no/such' cannot be loaded" in shown
