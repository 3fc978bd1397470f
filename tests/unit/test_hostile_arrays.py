"""Untrusted indices and tars with matching hashes: no array is trusted to have its stated size, and none runs code."""

import io
import os
import re
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import silent_progress

from core.npy import parse_header
from core.npz import read_npz, write_npz
from core.reading import DamagedFileError, sha256_of
from data.manifest import Manifest
from data.shards import MappedShards
from data.verify import verify

ENDLESS = 10**12


def with_index(folder: Path, name: str, make: Callable[[Path, dict[str, np.ndarray]], object]) -> None:
    """Replace one of the indices, and put its hash into the manifest."""
    path = folder / name
    with np.load(path) as index:
        arrays = {array: index[array].copy() for array in index.files}
    path.unlink()
    make(path, arrays)
    vouch(folder, name, sha256_of(path))


def vouch(folder: Path, name: str, sha256: str) -> None:
    """Put the hash of an index into the manifest; one for ``index.npz`` makes it the manifest of an earlier version."""
    if name == "index.npz":
        replace(Manifest.load(folder), index_sha256=sha256, labels_sha256=None).save(folder)
    else:
        replace(Manifest.load(folder), labels_sha256=sha256).save(folder)


def npz_of(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=compression)


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=allow_pickle)
    return content.getvalue()


def npy_that_says(header: str, values: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + values


def npy_of_shape(shape: str, descr: str = "<i8", values: bytes = b"") -> bytes:
    return npy_that_says(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n", values)


class Runs:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def without(name: str, member: bytes) -> Callable[[Path, dict[str, np.ndarray]], object]:
    """Return a function that writes the index with these bytes for one of its arrays."""

    def make(path: Path, arrays: dict[str, np.ndarray]) -> None:
        npz_of(path, [(f"{key}.npy", member if key == name else npy(array)) for key, array in arrays.items()])

    return make


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, dict[str, np.ndarray]], object]:
    return lambda path, arrays: write_npz(path, {**arrays, name: change(arrays[name])})


INDICES: dict[str, Callable[[Path, dict[str, np.ndarray]], object]] = {
    "pickled labels": without("label", npy(np.array([Runs()] * 50, dtype=object), allow_pickle=True)),
    "a program as a header": without("label", npy_that_says("__import__('os').mkdir('ran')\n")),
    "labels of a huge shape": without("label", npy_of_shape(f"({ENDLESS},)")),
    "labels of a shape that overflows": without("label", npy_of_shape(f"({2**40}, {2**40})")),
    "labels of a wide text": without("label", npy_of_shape("(50,)", "<U999999999")),
    "labels of structures": without("label", npy_that_says("{'descr': [('a', '<i8')], 'shape': (50,), }\n")),
    "labels of bad type": without("label", npy_of_shape("(50,)", "<f3", bytes(150))),
    "an endless header": without("label", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 10**5),
    "labels in Fortran's order": without("label", npy(np.asfortranarray(np.zeros((2, 25), np.int32)))),
    "no array": without("label", b"junk"),
    "an empty array": without("label", b""),
    "labels too few": changed("label", lambda label: label[:-1]),
    "labels in two rows": changed("label", lambda label: label.reshape(2, 25)),
    "labels that are floats": changed("label", lambda label: label.astype(np.float64)),
    "a label below zero": changed("label", lambda label: label - 9),
    "a label of no class": changed("label", lambda label: label + 99999999),
    "layouts too few": changed("layout", lambda layout: layout[:-1]),
    "layouts of three": changed("layout", lambda layout: np.pad(layout, ((0, 0), (0, 1)))),
    "an offset below zero": changed("layout", lambda layout: layout - [5000, 0]),
    "a stride below zero": changed("layout", lambda layout: layout * [20, -1]),
    "samples over each other": changed("layout", lambda layout: layout * [1, 0]),
    "samples past the end": changed("layout", lambda layout: layout + np.array([0, 2560])),
    "an offset that overflows": changed("layout", lambda layout: layout + 2**62),
    "no layouts": lambda path, arrays: write_npz(path, {"label": arrays["label"]}),
    "labels twice": lambda path, arrays: npz_of(
        path, [(f"{name}.npy", npy(array)) for name, array in [*arrays.items(), ("label", arrays["label"] * 0)]]
    ),
    "a bomb": lambda path, arrays: np.savez_compressed(path, **{**arrays, "label": np.zeros(10**7, np.int64)}),
    "a hundred thousand members": lambda path, arrays: npz_of(path, [(f"{i}.npy", b"") for i in range(10**4)]),
    "not a zip file": lambda path, arrays: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "a cut zip file": lambda path, arrays: (write_npz(path, arrays), path.write_bytes(path.read_bytes()[:-200])),
    "a sparse file": lambda path, arrays: (path.touch(), os.truncate(path, 2**33)),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["index.npz", "labels.npz"])
@pytest.mark.parametrize("make", INDICES)
def test_an_index_that_the_manifest_vouches_for_is_still_checked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if make == "a sparse file":
        (folder / name).unlink()
        INDICES[make](folder / name, {})
        vouch(folder, name, "0" * 64)
    else:
        with_index(folder, name, INDICES[make])
    tracemalloc.start()
    with pytest.raises(DamagedFileError, match=re.escape(name)):
        MappedShards(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert not (tmp_path / "ran").exists()
    if make != "a sparse file":
        assert name in {damage.file for damage in verify(folder, silent_progress)[1]}


@pytest.mark.parametrize(
    "source_ids",
    [np.arange(50), np.array(["x"] * 49), np.array(["x" * 1025] * 50), np.full(50, 0x110000, "<u4").view("<U1")],
    ids=["numbers", "too few", "too long", "no characters"],
)
def test_names_of_images_that_are_no_text_are_refused(folder: Path, source_ids: np.ndarray) -> None:
    with_index(folder, "index.npz", changed("source_id", lambda _: source_ids))
    shards = MappedShards(folder)
    with pytest.raises(DamagedFileError, match=r"index\.npz is damaged: source_id"):
        _ = shards.source_ids


def test_an_array_that_is_not_compressed_but_says_so_is_no_array(tmp_path: Path) -> None:
    """Damage the sizes in a zip file's directory, which are untrusted too."""
    write_npz(tmp_path / "x.npz", {"label": np.arange(5)})
    content = bytearray((tmp_path / "x.npz").read_bytes())
    start = content.index(b"PK\x01\x02")
    for size in (20, 24):  # compressed, uncompressed
        damaged = bytearray(content)
        damaged[start + size : start + size + 4] = (2**31).to_bytes(4, "little")
        with pytest.raises(DamagedFileError, match=r"x\.npz"):
            read_npz(bytes(damaged), "x.npz", ["label"])
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        try:
            assert read_npz(bytes(damaged), "x.npz", ["label"])["label"].tolist() == [0, 1, 2, 3, 4]
        except DamagedFileError:
            continue


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 4), np.float16), np.arange(7), np.array(["a", "bc"]), np.zeros((0, 5)), np.float32(3)]
)
def test_headers_that_numpy_writes_are_read(array: np.ndarray) -> None:
    content = npy(np.asarray(array))
    header = parse_header(content, "x.npz", "x")
    assert (header.shape, header.dtype) == (np.asarray(array).shape, np.asarray(array).dtype)
    assert header.num_bytes + header.num_value_bytes == len(content)


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def sample(key: str, label: bytes = b"1", array: bytes | None = None) -> list[tuple[tarfile.TarInfo, bytes]]:
    array = npy(np.zeros((2, 2, 8, 8), np.float16)) if array is None else array
    return [member(f"{key}.cls", label), member(f"{key}.moments.npy", array)]


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def patched(content: bytes, place: int, field: bytes) -> bytes:
    """Return a tar whose first header has other bytes at a place, and a matching checksum."""
    header = bytearray(content[:512])
    header[place : place + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


GOOD = sample("00000000")
TARS: dict[str, bytes] = {
    "a huge label": tar_of(sample("0", b"99999999999")),
    "a label of a million digits": tar_of(sample("0", b"9" * 10**6)),
    "a label that is no number": tar_of(sample("0", b"cat")),
    "a label of no class": tar_of(sample("0", b"5")),
    "an empty label": tar_of(sample("0", b"")),
    "an array of a huge shape": tar_of(sample("0", array=npy_of_shape(f"({ENDLESS},)", "<f2"))),
    "an array of objects": tar_of(sample("0", array=npy(np.array([Runs()], dtype=object), allow_pickle=True))),
    "an array of another shape": tar_of(sample("0", array=npy(np.zeros((1, 2, 8, 8), np.float16)))),
    "an array with values behind it": tar_of(sample("0", array=npy(np.zeros((2, 2, 8, 8), np.float16)) + bytes(512))),
    "an array cut short": tar_of(sample("0", array=npy(np.zeros((2, 2, 8, 8), np.float16))[:-512])),
    "a value that is no number": tar_of(sample("0", array=npy(np.full((2, 2, 8, 8), np.nan, np.float16)))),
    "a variance that is no number": tar_of(sample("0", array=npy(np.full((2, 2, 8, 8), 6e4, np.float16)))),
    "a link": tar_of([member("0.cls", b"1"), member("0.moments.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd")]),
    "a hard link": tar_of([member("0.cls", type=tarfile.LNKTYPE, linkname="x"), *GOOD[1:]]),
    "a device": tar_of([member("0.cls", type=tarfile.CHRTYPE, devmajor=1, devminor=5), *GOOD[1:]]),
    "a pipe": tar_of([member("0.cls", type=tarfile.FIFOTYPE), *GOOD[1:]]),
    "a folder": tar_of([member("0", type=tarfile.DIRTYPE), *GOOD]),
    "holes": tar_of([member("0.cls", type=tarfile.GNUTYPE_SPARSE), *GOOD[1:]]),
    "an extended header": tar_of([member("0.cls", b"1", pax_headers={"comment": "x"}), *GOOD[1:]], tarfile.PAX_FORMAT),
    "a long name": tar_of([member("x" * 300 + ".cls", b"1"), *GOOD[1:]], tarfile.GNU_FORMAT),
    "a label without its array": tar_of(GOOD[:1]),
    "two labels": tar_of([GOOD[0], *GOOD]),
    "a file of another kind": tar_of([*GOOD, member("00000000.txt", b"x")]),
    "one sample too many": tar_of([*GOOD, *sample("00000001")]),
    "none": tar_of([]),
    "samples at unequal distances": tar_of([*GOOD, *reversed(sample("1")), *sample("2")]),
    "a member of 8 GiB": patched(tar_of(GOOD), 124, b"77777777777\0"),
    "a member of a size below zero": patched(tar_of(GOOD), 124, b"\xff" * 12),
    "a member of a size in no digits": patched(tar_of(GOOD), 124, b"size of file"),
    "a header with another checksum": b"1" + tar_of(GOOD)[1:],
    "cut in a header": tar_of(GOOD)[:700],
    "cut in a value": tar_of(GOOD)[:2000],
    "no tar at all": b"junk" * 600,
}


@pytest.mark.parametrize("kind", TARS)
def test_a_tar_that_the_manifest_vouches_for_is_still_checked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    count = 3 if kind == "samples at unequal distances" else 1
    path = folder / "shard-000003.tar"
    path.write_bytes(TARS[kind])
    manifest = Manifest.load(folder)
    assert manifest.shards[3].count == 2
    entry = replace(manifest.shards[3], count=count, bytes=path.stat().st_size, sha256=sha256_of(path))
    replace(manifest, shards=[*manifest.shards[:3], entry]).save(folder)
    tracemalloc.start()
    found = [damage for damage in verify(folder, silent_progress)[1] if damage.file == path.name]
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert len(found) == 1, found
    assert not (tmp_path / "ran").exists()


def test_a_tar_of_sound_samples_is_no_damage(folder: Path) -> None:
    """Check that the tars above are sound without their damage."""
    path = folder / "shard-000003.tar"
    path.write_bytes(tar_of(GOOD))
    manifest = Manifest.load(folder)
    entry = replace(manifest.shards[3], count=1, bytes=path.stat().st_size, sha256=sha256_of(path))
    replace(manifest, shards=[*manifest.shards[:3], entry]).save(folder)
    assert not [damage for damage in verify(folder, silent_progress)[1] if damage.file == path.name]
