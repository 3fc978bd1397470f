"""Cached results are used only as they were written: damage is reported in one line, and made again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import silent_progress
from damage import DAMAGES, REPLACEABLE, flip, within
from test_generation import counting, evaluator
from test_references import Projected, write

from core.records import seal
from evaluation.chunks import Chunk, ChunkStore, discard
from evaluation.features.extractor import Features
from evaluation.image_files import NpzFile, PngFiles
from evaluation.kept import npy_of, parse_npy, read_kept, unless_damaged, write_kept
from evaluation.metrics.statistics import FeatureStatistics, frechet_distance
from evaluation.reference.reference import read_reference

SILENT = {"missing"}  # kinds of damage that look as if nothing had been kept


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the warnings on standard error."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_every_flipped_bit_of_a_kept_file_and_its_record_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, identity = tmp_path / "a.npy", {"of": "x"}
    content = npy_of(np.arange(3, dtype=np.float32))
    for file in (path, path.with_suffix(".json")):
        write_kept(path, content, identity)
        whole = file.read_bytes()
        for bit in range(0, 8 * len(whole), 11):
            file.write_bytes(whole)
            flip(file, bit)
            kept = unless_damaged(lambda: read_kept(path, identity))
            assert kept in (None, content)  # a bit of white space changes nothing
            if kept is None:
                assert f"{tmp_path}/a." in told(capsys)[0]
    write_kept(path, content, identity)
    assert unless_damaged(lambda: read_kept(path, {"of": "y"})) is None
    assert "a.json is the record of another result than a.npy; it is made again" in told(capsys)[0]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3)), "holds float64 (2, 3), but should hold float32 (2, any)"),
        (np.zeros((3, 2), np.float32), "holds float32 (3, 2)"),
        (np.zeros(2, np.float32), "holds float32 (2,)"),
        (np.full((2, 1), np.nan, np.float32), "values that are not finite"),
        (np.array([[1j], [2]], np.complex64), "holds complex64"),
    ],
)
def test_an_array_of_another_shape_or_type_is_damage(tmp_path: Path, array: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=r"a\.npy is damaged: .*") as raised:
        parse_npy(npy_of(array), tmp_path / "a.npy", (2, None), np.float32)
    assert words in str(raised.value)


def of_huge_shape() -> bytes:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 10000), }".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x80\x04junk", of_huge_shape()])
def test_what_is_no_npy_file_is_damage(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"a\.npy is damaged: it is not a \.npy file"):
        parse_npy(content, tmp_path / "a.npy", (None, None), np.float32)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "r.npz"
    write(path)
    return path


def numbers_of(reference: Path, cache: Path) -> tuple[float, bytes]:
    """Return two results that use a cache: a distance, from a root, and features of images."""
    read = read_reference(reference, Projected(), cache, silent_progress)
    real = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    return frechet_distance(read.statistics, FeatureStatistics.of(real)), read.vectors().tobytes()


@pytest.mark.parametrize("kind", REPLACEABLE)
@pytest.mark.parametrize("name", ["root-sigma.npy", "root-sigma.json", "vectors.npy", "vectors.json"])
def test_damaged_roots_and_features_of_a_reference_are_made_again(
    reference: Path, tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = numbers_of(reference, tmp_path)
    path = next(tmp_path.glob(f"reference-*/{name}"))
    capsys.readouterr()
    DAMAGES[kind](path)
    with within(20):
        assert numbers_of(reference, tmp_path) == expected
        lines = told(capsys)
        assert len(lines) == (0 if kind in SILENT else 1)
        assert all(str(path.with_suffix("")) in line and line.endswith("; it is made again.") for line in lines)
        assert numbers_of(reference, tmp_path) == expected
    assert told(capsys) == []  # and kept again


def test_a_kept_array_of_another_reference_or_extractor_is_not_taken(reference: Path, tmp_path: Path) -> None:
    """Change the end of each hash: folders are named by the beginnings, but the record has the full hashes."""
    expected = numbers_of(reference, tmp_path)
    record = next(tmp_path.glob("*/vectors.json"))
    content = json.loads(record.read_text())
    for key in ("reference", "extractor", "code", "array"):
        of_another = {**content["identity"], key: content["identity"][key][:16] + "0" * 48}
        body = {"identity": of_another, "num_bytes": content["num_bytes"], "sha256": content["sha256"]}
        record.write_text(json.dumps(seal(body)))
        with pytest.raises(ValueError, match="is the record of another result"):
            read_kept(record.with_suffix(".npy"), content["identity"])
        assert numbers_of(reference, tmp_path) == expected


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("", "is not a folder, but files are written below it"),
        ("*/vectors.npy", "is a folder, but a file of that name"),
    ],
)
def test_what_cannot_be_replaced_in_a_cache_is_named(reference: Path, tmp_path: Path, place: str, words: str) -> None:
    cache = tmp_path / "cache"
    numbers_of(reference, cache)
    kind = "a pipe" if place == "" else "a folder"
    path = next(cache.glob(place)) if place else next(cache.iterdir())
    DAMAGES[kind](path)
    with pytest.raises(ValueError, match=words) as raised:
        numbers_of(reference, cache)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device"])
def test_a_lock_that_is_no_file_is_named(reference: Path, tmp_path: Path, kind: str) -> None:
    numbers_of(reference, tmp_path)
    lock = next(tmp_path.glob("*/vectors.lock"))
    DAMAGES[kind](lock)
    with within(20), pytest.raises(ValueError, match="but it must be a file; remove it") as raised:
        numbers_of(reference, tmp_path)
    assert str(lock) in str(raised.value)


@pytest.mark.parametrize("kind", REPLACEABLE)
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_chunk_damaged_in_any_way_is_made_again(
    tmp_path: Path, suffix: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store, chunk = ChunkStore(tmp_path, {}), Chunk(2, 4, 7)
    features = Features(np.ones((3, 5), np.float32), np.arange(3))
    store.write(chunk, features)
    DAMAGES[kind](next(tmp_path.glob(f"*/*{suffix}")))
    with within(20):
        assert store.read(chunk) is None
    assert len(told(capsys)) == (0 if kind in SILENT else 1)
    store.write(chunk, features)
    found = store.read(chunk)
    assert found is not None
    np.testing.assert_array_equal(found.vectors, features.vectors)


@pytest.mark.parametrize(
    "features",
    [
        Features(np.ones((2, 5), np.float32)),
        Features(np.ones((3, 5))),  # type: ignore[arg-type]
        Features(np.ones(3, np.float32)),
        Features(np.full((3, 5), np.inf, np.float32)),
        Features(np.ones((3, 5), np.float32), np.zeros(2, np.int64)),
        Features(np.ones((3, 5), np.float32), np.zeros(3, np.int32)),  # type: ignore[arg-type]
        Features(np.ones((3, 5), np.float32), spatial=np.ones((4, 5), np.float32)),
        Features(None, np.arange(3)),  # type: ignore[arg-type]
    ],
)
def test_features_that_are_not_of_the_chunks_images_are_made_again(tmp_path: Path, features: Features) -> None:
    store = ChunkStore(tmp_path, {})
    store.write(Chunk(2, 4, 7), features)
    assert store.read(Chunk(2, 4, 7)) is None


def test_a_lock_of_chunks_that_is_no_file_is_named(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, {})
    with store.used():
        pass
    lock = next(tmp_path.glob("*/.lock"))
    DAMAGES["a folder"](lock)
    with pytest.raises(ValueError, match=r"\.lock is a folder, but it must be a file; remove it"), store.used():
        pass


def test_chunks_to_delete_are_folders_of_the_run_not_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks/train-x").symlink_to(tmp_path / "victim")
    (tmp_path / "chunks/train-y").write_text("a file")
    discard(tmp_path / "chunks", lambda _: True)
    assert list((tmp_path / "victim").iterdir()) == []


class Channels:
    """The identity autoencoder, cut to a number of channels."""

    def __init__(self, channels: int) -> None:
        self._channels = channels

    def decode(self, latent: Any) -> Any:
        return latent[:, : self._channels]


FILES: dict[str, Callable[[Path], NpzFile | PngFiles]] = {
    "npz": lambda folder: NpzFile(str(folder / "x.npz")),
    "png": lambda folder: PngFiles(str(folder / "x")),
}
PARTS = {"npz": ["x.npz.parts/00000007-00000014.npy", "x.npz.parts/00000007-00000014.json"]}
PARTS["png"] = ["x/000008.png", "x/.00000007-00000014.json"]


@pytest.mark.parametrize("form", FILES)
def test_images_that_were_damaged_between_two_jobs_are_generated_again(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(folder: Path, store: ChunkStore, fail_at: int | None = None) -> list[int]:
        make = counting(fail_at, autoencoder=Channels(3))
        evaluator().evaluate(make, silent_progress, store, FILES[form](folder))
        return make.made

    store = ChunkStore(tmp_path / "chunks", {})
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "a", store, 15)
    flip(tmp_path / "a" / PARTS[form][0])
    assert evaluate(tmp_path / "a", store) == list(range(7, 30))
    assert len(told(capsys)) == 1
    evaluate(tmp_path / "whole", ChunkStore(None, {}))
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", REPLACEABLE)
@pytest.mark.parametrize(("form", "name"), [(form, name) for form in FILES for name in PARTS[form]])
def test_images_damaged_in_any_way_count_as_missing(
    tmp_path: Path, form: str, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files, chunk = FILES[form](tmp_path), Chunk(1, 7, 14)
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    files.start("p", is_main=True)
    files.write(chunk, images)
    assert files.has(chunk)
    DAMAGES[kind](tmp_path / name)
    with within(20):
        assert not files.has(chunk)
    assert len(told(capsys)) == (0 if kind in SILENT else 1)
    files.write(chunk, images)
    assert files.has(chunk)


@pytest.mark.parametrize("kind", DAMAGES)
def test_parts_of_an_npz_whose_plan_was_damaged_are_thrown_away(tmp_path: Path, kind: str) -> None:
    files, chunk = NpzFile(str(tmp_path / "x.npz")), Chunk(0, 0, 2)
    files.start("a" * 64, is_main=True)
    files.write(chunk, np.zeros((2, 8, 8, 3), np.uint8))
    DAMAGES[kind](tmp_path / "x.npz.parts/.plan")
    with within(20):
        files.start("a" * 64, is_main=True)
    assert not files.has(chunk)
    files.write(chunk, np.zeros((2, 8, 8, 3), np.uint8))
    files.start("a" * 64, is_main=True)
    assert files.has(chunk)


def test_a_part_that_is_damaged_while_the_job_runs_does_not_reach_the_npz(tmp_path: Path) -> None:
    files = NpzFile(str(tmp_path / "x.npz"))
    files.start("p", is_main=True)
    chunks = [Chunk(0, 0, 2), Chunk(1, 2, 4)]
    for chunk in chunks:
        files.write(chunk, np.full((2, 8, 8, 3), chunk.first, np.uint8))
    flip(tmp_path / "x.npz.parts/00000002-00000004.npy")
    with pytest.raises(ValueError, match=r"00000002-00000004\.npy is damaged: .*; give the same command again"):
        files.finish(chunks, np.zeros(4, np.int64))
    assert not (tmp_path / "x.npz").exists()
    assert files.has(chunks[0])
    assert not files.has(chunks[1])


def test_where_an_npz_cannot_be_written_nothing_is_generated(tmp_path: Path) -> None:
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(ValueError, match=r"x\.npz is a folder, but a file of that name is written there"):
        NpzFile(str(tmp_path / "x.npz")).start("p", is_main=True)
    (tmp_path / "y.npz.parts").touch()
    with pytest.raises(ValueError, match=r"y\.npz\.parts is not a folder, but files are written below it"):
        NpzFile(str(tmp_path / "y.npz")).start("p", is_main=True)


@pytest.mark.parametrize("kind", DAMAGES)
def test_pngs_of_an_evaluation_that_is_no_longer_known_are_not_mixed_with_others(tmp_path: Path, kind: str) -> None:
    files = PngFiles(str(tmp_path / "pngs"))
    files.start("a" * 64, is_main=True)
    files.write(Chunk(0, 0, 2), np.zeros((2, 8, 8, 3), np.uint8))
    DAMAGES[kind](tmp_path / "pngs/.plan")
    with within(20), pytest.raises(ValueError, match=r"name another folder than .*pngs by evaluation.image_file.path"):
        files.start("a" * 64, is_main=True)


@pytest.mark.parametrize("form", FILES)
def test_images_that_an_earlier_version_left_are_generated_again(tmp_path: Path, form: str) -> None:
    """Delete the hashes of parts, which an earlier version did not write."""
    files, chunk = FILES[form](tmp_path), Chunk(0, 0, 2)
    files.start("p", is_main=True)
    files.write(chunk, np.zeros((2, 8, 8, 3), np.uint8))
    assert files.has(chunk)
    for record in tmp_path.rglob("*.json"):
        record.unlink()
    assert not files.has(chunk)
