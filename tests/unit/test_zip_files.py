"""Images are read from an untrusted zip file, with labels by folder or by ``dataset.json``."""

import json
import os
import shutil
import stat
import struct
import subprocess
import zipfile
from pathlib import Path

import boto3
import pytest
from pictures import encoded, make_image_folder, photo
from s3_server import BUCKET, s3_server
from test_encode import encode_folder
from test_links import skipped
from test_sources import contents

from data.image_folder import ImageFolder
from data.images import UnreadableImageError
from data.zip_files import ZipFiles
from model.autoencoder import IdentityAutoencoder


def zip_of(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


def zip_of_folder(path: Path, root: Path, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED) -> str:
    names = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
    return zip_of(path, {prefix + name: (root / name).read_bytes() for name in names}, compression)


PICTURE = encoded(photo(0), "PNG")


@pytest.mark.parametrize("prefix", ["", "images/", "home/me/images/"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_file_is_the_source_that_its_folder_is(tmp_path: Path, prefix: str, compression: int) -> None:
    root = make_image_folder(tmp_path / "root", 3)
    folder = ImageFolder(str(root))
    zipped = ImageFolder(zip_of_folder(tmp_path / "Images.ZIP", root, prefix, compression))
    assert contents(zipped) == contents(folder)
    assert (zipped.class_names, zipped.fingerprint) == (folder.class_names, folder.fingerprint)
    assert zipped.left_out == []


def test_a_job_continues_from_a_folder_with_its_zip_file(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 3)
    before = encode_folder(root, tmp_path / "shards", IdentityAutoencoder(3))
    zipped = Path(zip_of_folder(tmp_path / "root.zip", root))
    assert encode_folder(zipped, tmp_path / "shards", IdentityAutoencoder(3)).hash == before.hash
    assert encode_folder(zipped, tmp_path / "other", IdentityAutoencoder(3)).shards == before.shards


@pytest.mark.skipif(shutil.which("zip") is None, reason="there is no zip program")
def test_what_the_zip_program_packs_is_read_and_its_links_are_named(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 3)
    (root / "ant/link.jpg").symlink_to("000.JPEG")
    subprocess.run(["zip", "-qry", str(tmp_path / "a.zip"), "root"], cwd=tmp_path, check=True)
    source = ImageFolder(str(tmp_path / "a.zip"))
    assert len(source) == 9
    assert source[4].content == (root / "bee/001.JPEG").read_bytes()
    assert [(entry.source_id, entry.reason) for entry in source.left_out] == [
        ("ant/link.jpg", "it is a link in the zip file")
    ]
    subprocess.run(["zip", "-qr", str(tmp_path / "b.zip"), "root"], cwd=tmp_path, check=True)  # which follows links
    assert len(ImageFolder(str(tmp_path / "b.zip"))) == 10


def test_a_zip_file_in_a_store_is_read(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 3)
    zip_of_folder(tmp_path / "images.zip", root)
    with s3_server():
        boto3.client("s3").upload_file(str(tmp_path / "images.zip"), BUCKET, "sets/images.zip")
        assert contents(ImageFolder(f"s3://{BUCKET}/sets/images.zip")) == contents(ImageFolder(str(root)))


def numbered(labels: object, count: int = 4) -> dict[str, bytes]:
    """Write a zip file as NVlabs' dataset_tool.py does, with folders that only number the images."""
    images = {f"{number // 2:05d}/img{number:08d}.png": encoded(photo(number), "PNG") for number in range(count)}
    return {**images, "dataset.json": json.dumps({"labels": labels}).encode()}


def pairs(*labels: object) -> list[list[object]]:
    return [[f"{number // 2:05d}/img{number:08d}.png", label] for number, label in enumerate(labels)]


@pytest.mark.parametrize("unpacked", [False, True])
def test_labels_of_dataset_json_come_before_folders(tmp_path: Path, unpacked: bool) -> None:
    place = zip_of(tmp_path / "dataset.zip", numbered(pairs(6, 0, 2, 6)), zipfile.ZIP_STORED)
    other = zip_of(tmp_path / "other.zip", numbered(pairs(6, 0, 2, 5)), zipfile.ZIP_STORED)
    if unpacked:
        for name in (place, other):
            zipfile.ZipFile(name).extractall(name[:-4])
        place, other = place[:-4], other[:-4]
    source = ImageFolder(place)
    assert source.class_names == [str(number) for number in range(7)]
    assert [label for _, _, label in contents(source)] == [6, 0, 2, 6]
    assert source[3].content == encoded(photo(3), "PNG")
    assert source.fingerprint != ImageFolder(other).fingerprint  # of images of the same names and sizes


def test_without_labels_a_numbered_data_set_is_one_class(tmp_path: Path) -> None:
    source = ImageFolder(zip_of(tmp_path / "dataset.zip", numbered(None)))
    assert source.class_names == ["images"]
    assert [label for _, _, label in contents(source)] == [0] * 4


def test_labels_that_do_not_fit_their_images_are_refused_or_named(tmp_path: Path) -> None:
    def opened(labels: object) -> ImageFolder:
        return ImageFolder(zip_of(tmp_path / "a.zip", numbered(labels)))

    with pytest.raises(
        ValueError, match=r"1 of 4 images in .*a.zip have no label in dataset.json, the first is 00001/img00000003"
    ):
        opened(pairs(0, 1, 2))
    with pytest.raises(ValueError, match=r"a.zip/dataset.json gives 00000/img00000001.png the label \[0.5, 1.0\], but"):
        opened(pairs(0, [0.5, 1.0], 2, 2))
    with pytest.raises(ValueError, match=r"the label -1, but a label is a whole number from 0 to 1000000"):
        opened(pairs(0, -1, 2, 2))
    with pytest.raises(ValueError, match=r"the label 10000000000, but"):
        opened(pairs(0, 10**10, 2, 2))
    source = opened([*pairs(0, 1, 2, 2), ["gone.png", 1]])
    assert [(entry.source_id, entry.is_image) for entry in source.left_out] == [("gone.png", True)]
    with pytest.raises(ValueError, match=r"a.zip/dataset.json is damaged: it is not JSON"):
        ImageFolder(zip_of(tmp_path / "a.zip", {**numbered(None), "dataset.json": b"{"}))


@pytest.mark.parametrize(
    "content", ['{"labels": ["ant", "bee"]}', '{"name": "x"}', "[1]", '{"labels": [["other", 1]]}']
)
def test_a_dataset_json_of_another_program_is_passed_over(tmp_path: Path, content: str) -> None:
    members = {"ant/a.png": PICTURE, "bee/a.png": PICTURE, "dataset.json": content.encode()}
    assert ImageFolder(zip_of(tmp_path / "a.zip", members)).class_names == ["ant", "bee"]


@pytest.mark.parametrize("name", ["../../etc/x.png", "/etc/x.png", "ant/../../x.png", "ant//x.png", "ant/\x07.png"])
def test_a_name_that_leads_out_of_the_zip_file_is_left_out(tmp_path: Path, name: str) -> None:
    members = {"ant/a.png": PICTURE, "bee/a.png": PICTURE, name: PICTURE}
    source = ImageFolder(zip_of(tmp_path / "a.zip", members))
    assert [source_id for source_id, _, _ in contents(source)] == ["ant/a.png", "bee/a.png"]
    assert source.class_names == ["ant", "bee"]
    assert [(entry.source_id, entry.reason, entry.is_image) for entry in source.left_out] == [
        (name, "it has a name that leads out of the zip file", True)
    ]


def test_names_with_the_separators_of_windows_are_paths(tmp_path: Path) -> None:
    source = ImageFolder(zip_of(tmp_path / "a.zip", {"ant\\a.png": PICTURE, "bee\\": b"", "bee\\a.png": PICTURE}))
    assert [(source_id, label) for source_id, _, label in contents(source)] == [("ant/a.png", 0), ("bee/a.png", 1)]


def test_litter_in_a_zip_file_is_passed_over_and_an_empty_class_is_named(tmp_path: Path) -> None:
    members = {"ant/a.png": PICTURE, "bee/a.png": PICTURE, "__MACOSX/ant/._a.png": b"x", "ant/.DS_Store": b"x"}
    source = ImageFolder(zip_of(tmp_path / "a.zip", members))
    assert (source.class_names, source.left_out) == (["ant", "bee"], [])
    with pytest.raises(ValueError, match=r"1 of 3 class folders in .*b.zip .* cat \(is empty\)"):
        ImageFolder(zip_of(tmp_path / "b.zip", {**members, "cat/": b""}))
    with pytest.raises(ValueError, match=r"1 of 3 class folders in .*b.zip .* cat \(a.heic: its format is not read\)"):
        ImageFolder(zip_of(tmp_path / "b.zip", {**members, "cat/a.heic": b"x"}))


def test_a_bomb_is_one_unreadable_image_and_takes_no_memory(tmp_path: Path) -> None:
    """Declare 3 GiB in one entry, and let another unpack to more than its entry declares."""
    zeros = bytes(10**6)
    place = zip_of(tmp_path / "a.zip", {"a.png": PICTURE, "b.png": zeros, "c.png": zeros})
    damaged = bytearray((tmp_path / "a.zip").read_bytes())
    said = struct.pack("<I", len(zeros))
    directory = damaged.index(b"PK\x01\x02")
    second = damaged.index(said, directory)
    third = damaged.index(said, second + 4)
    damaged[second : second + 4] = struct.pack("<I", 3 * 2**30)
    damaged[third : third + 4] = struct.pack("<I", 1000)
    (tmp_path / "a.zip").write_bytes(damaged)
    source = ImageFolder(place)
    assert source[0].content == PICTURE
    with pytest.raises(UnreadableImageError, match=f"it has {3 * 2**30} bytes unpacked, but at most {2**31} are read"):
        source[1]
    with pytest.raises(UnreadableImageError, match="it does not have the 1000 bytes that the zip file states"):
        source[2]


def test_what_cannot_be_unpacked_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    members = {f"{name}/x.png": PICTURE for name in ("bits", "crypt", "header", "sound")}
    place = zip_of(tmp_path / "a.zip", members, zipfile.ZIP_STORED)
    with zipfile.ZipFile(place, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("lzma/x.png", PICTURE)
    infos = {info.filename: info for info in zipfile.ZipFile(place).infolist()}
    damaged = bytearray(Path(place).read_bytes())
    damaged[infos["bits/x.png"].header_offset + 100] ^= 1
    damaged[infos["header/x.png"].header_offset] ^= 1
    entry = damaged.index(b"crypt/x.png", damaged.index(b"PK\x01\x02")) - 46
    damaged[entry + 8] |= 1
    Path(place).write_bytes(damaged)
    manifest = encode_folder(Path(place), tmp_path / "shards", IdentityAutoencoder(3), max_skipped_fraction=0.8)
    assert manifest.num_samples == 1
    assert manifest.class_names == ["bits", "crypt", "header", "lzma", "sound"]
    assert skipped(tmp_path / "shards") == {
        "bits/x.png": "it does not match its checksum in the zip file",
        "crypt/x.png": "it is encrypted in the zip file",
        "header/x.png": "its header in the zip file is damaged",
        "lzma/x.png": "its compression in the zip file, method 14, is not read; make the zip with deflate",
    }


def test_an_entry_that_is_a_device_is_left_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", PICTURE)
        info = zipfile.ZipInfo("b.png")
        info.create_system, info.external_attr = 3, (stat.S_IFCHR | 0o644) << 16
        archive.writestr(info, PICTURE)
    assert [entry.reason for entry in ImageFolder(str(tmp_path / "a.zip")).left_out] == [
        "it is a device in the zip file"
    ]


def test_a_zip_file_that_is_damaged_missing_or_no_file_is_one_sentence(tmp_path: Path) -> None:
    place = zip_of(tmp_path / "a.zip", {"a.png": PICTURE, "b.png": PICTURE})
    sound = Path(place).read_bytes()
    for cut in (b"", b"garbage" * 100, sound[:-30], sound[: len(sound) // 2]):
        Path(place).write_bytes(cut)
        with pytest.raises(ValueError, match=r"a.zip is not a valid zip file \(.*\); fetch or make it again"):
            ImageFolder(place)
    Path(place).unlink()
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.zip is missing; give the zip file itself"):
        ImageFolder(place)
    os.mkfifo(place)
    with pytest.raises(ValueError, match=r"a.zip is a named pipe"):
        ImageFolder(place)
    Path(place).unlink()
    Path(place).write_bytes(sound.replace(b"b.png", b"a.png"))
    with pytest.raises(ValueError, match=r"a.zip has a.png twice; names must be unique"):
        ImageFolder(place)
    with pytest.raises(ValueError, match=r"There are no images among the 1 files in .*b.zip, but 1 tar files"):
        ImageFolder(zip_of(tmp_path / "b.zip", {"x.tar": b"x"}))


def test_every_flipped_bit_of_a_zip_file_is_found_or_changes_no_pixel(tmp_path: Path) -> None:
    place = Path(zip_of(tmp_path / "a.zip", {"a/a.png": encoded(photo(0, 4, 4), "PNG"), "b/b.png": PICTURE[:40]}))
    sound = place.read_bytes()
    before = {name: content for name, content, _ in contents(ImageFolder(str(place)))}
    for bit in range(0, 8 * len(sound), 3):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        place.write_bytes(damaged)
        try:
            files = ZipFiles(str(place))
            for name in files.sizes:
                found = files.read(name)
                assert found in before.values()
        except (ValueError, UnreadableImageError):
            continue
