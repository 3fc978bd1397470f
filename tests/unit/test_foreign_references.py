"""The claims of untrusted reference files in archive, headers and text are checked before anything is unpacked."""

import io
import json
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import silent_progress
from damage import DAMAGES, within
from test_references import Projected, write

from core.archives import PIECE_BYTES
from core.npz import headers_of, read_array, rows_of, write_npz
from evaluation.metrics.frechet import FrechetDistance, SpatialFrechetInceptionDistance
from evaluation.metrics.statistics import FeatureStatistics
from evaluation.reference.reference import Reference, read_reference

ABOUT = {"name": "real", "images": 50, "num_classes": 5, "feature_extractor": "projections"}
ABOUT["feature_extractor_hash"] = "a" * 64


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    """Return a small reference for `Projected`; None leaves an array out."""
    random = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {"about": np.array(json.dumps(ABOUT))}
    for size, suffix in ((6, ""), (4, "_s")):
        rows = random.normal(size=(50, size))
        found |= {f"mu{suffix}": rows.mean(axis=0), f"sigma{suffix}": np.cov(rows, rowvar=False)}
    found["arr_0"] = random.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    return {name: array for name, array in (found | changes).items() if array is not None}


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def with_header(header: str, content: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


def zipped(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return path


def read(path: Path, cache: Path) -> Reference:
    """Read everything that a job uses of a reference."""
    found = read_reference(path, Projected(), cache, silent_progress)
    FrechetDistance().require(Projected(), found, 30)
    if found.spatial is not None:
        assert found.spatial.root.shape[0] == len(found.spatial.mean)
    found.vectors()
    return found


def refused(path: Path, words: str) -> None:
    with within(20), pytest.raises(ValueError, match=r".") as raised:
        read(path, path.parent / "cache")
    assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_reference_damaged_in_any_way_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """Name what to fetch where the reference is missing."""
    np.savez(tmp_path / "r.npz", **arrays())
    whole = read(tmp_path / "r.npz", tmp_path / "cache")
    DAMAGES[kind](tmp_path / "r.npz")
    if kind == "longer":  # of an archive the end is looked for
        assert read(tmp_path / "r.npz", tmp_path / "cache").hash != whole.hash
    else:
        refused(tmp_path / "r.npz", "There is no reference" if kind == "missing" else "r.npz")


def test_every_flipped_bit_of_a_reference_is_found_or_changes_nothing_but_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    write(path, num_kept=4)

    def numbers() -> tuple[Any, ...]:
        found = read_reference(path, Projected(), tmp_path / "cache", silent_progress)
        spatial = found.spatial
        assert spatial is not None
        given = [found.statistics.mean, found.statistics.covariance, spatial.mean, spatial.covariance]
        facts = (found.name, found.image_size, found.num_classes, found.num_vectors, found.statistics.count)
        images = b"".join(rows.tobytes() for rows in rows_of(path, "arr_0", 250))
        return (*facts, images, *(array.tobytes() for array in given))

    whole, expected = path.read_bytes(), numbers()
    random, refusals = np.random.default_rng(0), 0
    for place in random.permutation(len(whole))[:600]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            found: Any = numbers()
        except ValueError as error:
            found = str(error)
            refusals += 1
        assert found == expected or str(path) in found, place
    assert refusals > 500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mu": np.zeros(6, complex)}, "has mu of complex128, but statistics are float32 or float64"),
        ({"sigma": np.eye(6, dtype=complex)}, "has sigma of complex128"),
        ({"mu": np.array(["1"] * 6)}, "has mu of <U1"),
        ({"mu": np.arange(6)}, "has mu of int64"),
        ({"mu": np.zeros(6, np.longdouble)}, "has mu of float128"),
        ({"mu": np.zeros(6, [("a", "f8")])}, "has mu of [('a', '<f8')]"),
        ({"mu": np.zeros(())}, "has mu of shape () and sigma of shape (6, 6)"),
        ({"mu": np.zeros((2, 3))}, "has mu of shape (2, 3) and sigma of shape (6, 6)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "has 0 numbers in mu, but from 1 to 16384 are read"),
        ({"sigma": np.full((6, 6), np.nan)}, "mu or sigma of the reference"),
        ({"mu": np.full(6, 1e300)}, "mu of the reference"),
        ({"sigma": np.eye(6) * 1e300}, "has a value of size 1e+300, but float32 features give at most 1e+76"),
        ({"sigma": np.eye(6) + np.eye(6, k=2)}, "is not symmetric: 1 in row 0, column 2, but 0 in row 2, column 0"),
        ({"sigma": -np.eye(6)}, "sigma of the reference"),
        ({"sigma": np.diag([1.0, 1, 1, 1, 1, -0.5])}, "has an eigenvalue of -0.5, but a covariance has none below 0"),
        ({"sigma_s": -np.eye(4)}, "sigma_s of the reference"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "has arr_0 of uint8 (0, 8, 8, 3), but images are"),
        ({"arr_0": np.zeros((6, 8, 8), np.uint8)}, "has arr_0 of uint8 (6, 8, 8)"),
        ({"arr_0": np.zeros((6, 8, 8, 3), bool)}, "has arr_0 of bool (6, 8, 8, 3)"),
        ({"about": np.array("[" * 10**6)}, "about of the reference"),
        ({"about": np.array("{" + '"a":' * 1000)}, "about of the reference"),
        ({"about": np.array('{"name": "' + "x" * 10**7 + '"}')}, "takes 40000048 bytes, but at most 4194304 are read"),
        ({"about": np.array("x" * 100)}, "about of the reference"),
        ({"about": np.array('{"name": "\\u001b[31m"}')}, "about of the reference"),
        ({"about": np.array('{"name": ""}')}, "about of the reference"),
        ({"about": np.array('{"images": NaN}')}, "about of the reference"),
        ({"about": np.array('{"images": 1e400}')}, "about of the reference"),
        ({"about": np.array('{"images": "50"}')}, "has images '50', but input should be a valid integer"),
        ({"about": np.array('{"images": true}')}, "has images True, but"),
        ({"about": np.array('{"images": ' + "9" * 5000 + "}")}, "about of the reference"),
        ({"about": np.array('{"num_classes": -1}')}, "has num_classes -1, but"),
        ({"about": np.array(b"{}")}, "it is |S2 (), not text"),
        ({"about": np.array(["{}"])}, "it is <U2 (1,), not text"),
        ({"about": np.array("null")}, "about of the reference"),
    ],
)
def test_a_reference_of_other_content_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    np.savez_compressed(tmp_path / "r.npz", **arrays(**change))
    refused(tmp_path / "r.npz", words)


HEADERS = {
    "of a lying shape": ("(7,)", "says 48"),
    "of a huge shape": ("(1000000000000,)", "takes 8000000000000 bytes, but the file says 48"),
    "of a shape beyond numbers": ("(99999999999999999999, 99999999999999999999)", "but the file says 48"),
    "of a negative length": ("(-6,)", "which is not an array of plain values"),
    "of no shape": ("6", "is complete"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path: Path, kind: str) -> None:
    shape, words = HEADERS[kind]
    content = with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}", np.zeros(6).tobytes())
    zipped(tmp_path / "r.npz", [("mu.npy", content), ("sigma.npy", npy(np.eye(6)))])
    with pytest.raises(ValueError, match=r"r\.npz") as raised:
        headers_of(tmp_path / "r.npz")
    assert words in str(raised.value) or "is it complete?" in str(raised.value)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (6,), }",
        "{'descr': '<f8', 'fortran_order': 2, 'shape': (6,), }",
        "{'descr': __import__('os').system('true'), 'fortran_order': False, 'shape': (6,), }",
        "(" * 100,
        "[]",
        "",
        "{'descr': [('a', '<f8', (10**9,))], 'fortran_order': False, 'shape': (6,), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (6,), 'more': 1}",
    ],
)
def test_a_header_of_something_else_is_refused(tmp_path: Path, header: str) -> None:
    members = [("mu.npy", with_header(header, np.zeros(6).tobytes())), ("sigma.npy", npy(np.eye(6)))]
    refused(zipped(tmp_path / "r.npz", members), "r.npz")


def test_pickled_objects_in_a_reference_do_not_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    np.savez(tmp_path / "r.npz", **arrays(mu=np.array([Runs()], dtype=object)))
    refused(tmp_path / "r.npz", "which is not an array of plain values")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (["mu", "sigma", "mu"], "holds 'mu.npy' twice"),
        (["mu", "sigma", "../mu"], "names the file '../mu.npy', which is not a plain file name"),
        (["mu", "sigma", "/etc/passwd"], "not a plain file name"),
        (["mu", "sigma", "a\\b"], "not a plain file name"),
        (["mu", "sigma", "a\x1bb"], "not a plain file name"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_come_twice_or_lead_elsewhere_are_refused(tmp_path: Path, members: list[str], words: str) -> None:
    content = {"mu": npy(np.zeros(6)), "sigma": npy(np.eye(6))}
    zipped(tmp_path / "r.npz", [(f"{name}.npy", content.get(name, npy(np.zeros(1)))) for name in members])
    refused(tmp_path / "r.npz", words)


def test_a_member_that_is_no_array_is_named(tmp_path: Path) -> None:
    refused(zipped(tmp_path / "r.npz", [("mu.npy", npy(np.zeros(6))), ("README", b"hello")]), "holds 'README'")


def bomb(path: Path, declared: int, header: str) -> Path:
    """Write an archive whose member claims to unpack to ``declared`` bytes, but holds a few zeros."""
    content = with_header(header, bytes(10**6))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(content) + packer.flush()
    name = b"mu.npy"
    fields = (20, 0, 8, 0, 0x21, zlib.crc32(content), len(packed), declared)
    local = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *fields, len(name), 0) + name
    entry = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, *fields, len(name), 0, 0, 0, 0, 0, 0) + name
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), len(local) + len(packed), 0)
    path.write_bytes(local + packed + entry + end)
    return path


def test_what_would_unpack_to_more_than_memory_is_refused_without_unpacking(tmp_path: Path) -> None:
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (500000000,), }"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(bomb(tmp_path / "a.npz", 4 * 10**9 + 128, header), "has no sigma")
    with pytest.raises(ValueError, match="takes 4000000000 bytes, but at most 1000 are read"):
        read_array(tmp_path / "a.npz", "mu", 1000)
    (tmp_path / "b").mkdir()
    refused(bomb(tmp_path / "b/b.npz", 10**6 + 128, header), "takes 4000000000 bytes, but the file says 1000000")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000  # KB


def test_images_too_large_to_look_at_are_refused_without_unpacking(tmp_path: Path) -> None:
    write_npz(tmp_path / "r.npz", {**arrays(arr_0=None), "arr_0": np.zeros((1, 6000, 6000, 1), np.uint8)})
    refused(tmp_path / "r.npz", "has images of 6000x6000x1, of which 250 take 9000000000 bytes")


def test_an_archive_with_an_endless_directory_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", **{f"a{i}": np.zeros(0) for i in range(PIECE_BYTES // 50)})
    refused(tmp_path / "r.npz", "bytes are asked for at once")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rare_compression_is_refused(tmp_path: Path, method: int) -> None:
    refused(zipped(tmp_path / "r.npz", [("mu.npy", npy(np.zeros(6)))], method), "its compression is not read")


def test_a_file_replaced_while_a_job_runs_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", **arrays())
    found = read_reference(tmp_path / "r.npz", Projected(), tmp_path / "cache", silent_progress)
    np.savez(tmp_path / "r.npz", **arrays(arr_0=np.zeros((6, 8, 8, 1), np.uint8)))
    with pytest.raises(ValueError, match=f"r.npz had sha256 {found.hash} when this job began, but has"):
        found.vectors()


def test_a_reference_of_more_numbers_than_the_extractor_gives_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", **arrays(mu=np.zeros(7), sigma=np.eye(7), mu_s=np.zeros(7), sigma_s=np.eye(7)))
    found = read_reference(tmp_path / "r.npz", Projected(), tmp_path / "cache", silent_progress)
    samples = FeatureStatistics.of(np.random.default_rng(0).normal(size=(30, 6)))
    for metric in (FrechetDistance(), SpatialFrechetInceptionDistance()):
        with pytest.raises(ValueError, match="The reference real holds a mean of 7 numbers, but the extractor gives 6"):
            metric.compute(samples, found, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_any_order_and_packing_are_read_as_numpy_reads_them(tmp_path: Path, order: Any, save: Any) -> None:
    images = np.asarray(np.random.default_rng(0).integers(0, 256, (7, 5, 5, 2), dtype=np.uint8), order=order)
    save(tmp_path / "a.npz", x=images, e=np.zeros((0, 3)))
    np.testing.assert_array_equal(read_array(tmp_path / "a.npz", "x", 1000), images)
    blocks = list(rows_of(tmp_path / "a.npz", "x", 3))
    assert [len(block) for block in blocks] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), images)
    assert read_array(tmp_path / "a.npz", "e", 0).shape == (0, 3)


def test_where_a_reference_cannot_be_written_nothing_is_computed(in_process: Any, tmp_path: Path) -> None:
    (tmp_path / "r.npz").mkdir()
    (tmp_path / "file").touch()
    words = "r.npz is a folder, but a file of that name is written there"
    assert words in in_process("reference", "out=r.npz", expect=2)
    assert "file is not a folder, but files are written below it" in in_process("reference", "out=file/r.npz", expect=2)
    assert not (tmp_path / "cache").exists()
