"""Every member of a webdataset tar is a sample, part of one, or named; a damaged tar never ends early silently."""

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, photo
from test_left_out import LFS_POINTER
from test_sources import contents, make_tars

from data.images import UnreadableImageError
from data.tars import ImageTars, LatentTars

PICTURE = encoded(photo(0), "PNG")


def tar_of(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> str:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            info.size = 0 if isinstance(content, tarfile.TarInfo) else len(content)
            file.addfile(info, None if isinstance(content, tarfile.TarInfo) else io.BytesIO(content))
    return str(path)


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def left_out(source: ImageTars | LatentTars) -> dict[str, str]:
    assert all(entry.is_image for entry in source.left_out)
    return {entry.source_id: entry.reason for entry in source.left_out}


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "img", "Jpg"])
def test_samples_have_any_of_the_usual_suffixes_in_any_case(tmp_path: Path, suffix: str) -> None:
    place = tar_of(
        tmp_path / "a.tar", {f"n/1.{suffix}": PICTURE, "n/1.CLS": b"2\n", "n/1.json": b"{}", "n/1.txt": b"a"}
    )
    assert contents(ImageTars(place)) == [("a.tar/n/1", PICTURE, 2)]


def test_a_key_without_a_usual_image_is_one_of_any_format_that_pillow_reads(tmp_path: Path) -> None:
    members = {"a.bmp": PICTURE, "a.cls": b"0", "b.png": PICTURE, "b.bmp": b"other", "b.cls": b"1", "c.gif": PICTURE}
    source = ImageTars(tar_of(tmp_path / "a.tar", members))
    assert sorted(contents(source)) == [("a.tar/a", PICTURE, 0), ("a.tar/b", PICTURE, 1)]
    assert left_out(source) == {"a.tar/c.gif": "it has no .cls"}


def test_names_with_several_dots_are_named_where_their_key_has_no_sample(tmp_path: Path) -> None:
    members = {
        "a.jpg": PICTURE,
        "a.cls": b"0",
        "a.seg.png": b"a part of sample a",
        "cat.01.jpg": PICTURE,
        "cat.01.cls": b"1",
    }
    source = ImageTars(tar_of(tmp_path / "a.tar", members))
    reason = "its name has several dots, but the key ends at the first, so that cat is its key; rename it"
    assert len(source) == 1
    assert left_out(source) == {"a.tar/cat.01.jpg": reason}
    place = tar_of(tmp_path / "b.tar", {"v1.0/cat.01.jpg": PICTURE, "v1.0/cat.01.cls": b"1"})
    with pytest.raises(
        ValueError, match=r"There are no samples .* in the 1 tars of .*; b.tar/v1.0/cat.01.jpg is left out: its name"
    ):
        ImageTars(place)
    place = tar_of(tmp_path / "c.tar", {"1.0.npy": b"", "1.0.cls": b"1"})
    with pytest.raises(ValueError, match=r"; c.tar/1.0.npy is left out: its name has several dots"):
        LatentTars(place)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            tarfile.LNKTYPE,
            "it is a link, which `tar --dereference --hard-dereference` replaces by the file, in the tar",
        ),
        (
            tarfile.SYMTYPE,
            "it is a link, which `tar --dereference --hard-dereference` replaces by the file, in the tar",
        ),
        (tarfile.CHRTYPE, "it is a device or a pipe in the tar"),
        (tarfile.FIFOTYPE, "it is a device or a pipe in the tar"),
    ],
)
def test_links_and_devices_in_a_tar_are_set_aside_by_name(tmp_path: Path, kind: bytes, reason: str) -> None:
    members = {"a.jpg": PICTURE, "a.cls": b"0", "b.jpg": special(kind, "/etc/passwd"), "b.cls": b"1"}
    source = ImageTars(tar_of(tmp_path / "a.tar", members))
    assert contents(source) == [("a.tar/a", PICTURE, 0)]
    assert left_out(source) == {"a.tar/b.jpg": reason}


def test_formats_that_are_not_read_are_set_aside_and_litter_is_passed_over(tmp_path: Path) -> None:
    members = {
        "./a.jpg": PICTURE,
        "./a.cls": b"0",
        "./b.heic": b"x",
        "./b.cls": b"1",
        "./._a.jpg": b"x",
        "./._a.cls": b"x",
    }
    source = ImageTars(tar_of(tmp_path / "a.tar", members))
    assert contents(source) == [("a.tar/a", PICTURE, 0)]
    assert left_out(source) == {"a.tar/./b.heic": "its format is not read; convert it to JPEG or PNG"}


def test_labels_in_another_form_are_not_called_absent(tmp_path: Path) -> None:
    place = tar_of(tmp_path / "a.tar", {"a.jpg": PICTURE, "a.json": b'{"label": 3}', "a.txt": b"3"})
    with pytest.raises(
        ValueError, match=r"a.tar has a without a .cls, but with a.json, a.txt; labels are read only from KEY.cls"
    ):
        ImageTars(place)
    place = tar_of(tmp_path / "b.tar", {"a.mp4": PICTURE, "a.cls": b"3"})
    with pytest.raises(ValueError, match=r"b.tar has a without its sample, but with a.mp4"):
        ImageTars(place)


@pytest.mark.parametrize("label", [b"1" * 65, b"9" * 5000, b"1000001", b"", b"1 2", b"\xff"])
def test_a_label_that_cannot_be_one_is_refused_before_a_table_of_classes_is_made(tmp_path: Path, label: bytes) -> None:
    with pytest.raises(
        ValueError, match=r"a.tar has a.cls .*, but (a label is a whole number|labels run from 0 to 1000000)"
    ):
        ImageTars(tar_of(tmp_path / "a.tar", {"a.jpg": PICTURE, "a.cls": label}))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    members = {name: content for key in "abc" for name, content in {f"{key}.jpg": PICTURE, f"{key}.cls": b"1"}.items()}
    path = Path(tar_of(tmp_path / "a.tar", members))
    sound = path.read_bytes()
    header = sound.index(b"b.jpg")
    for damaged in (header, header + 130, header + 150):
        content = bytearray(sound)
        content[damaged] ^= 4
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"a.tar is not a valid tar file \(the header at byte {header} is damaged\)"
        ):
            ImageTars(str(path))
    path.write_bytes(sound[: header + 100])
    with pytest.raises(ValueError, match=rf"a.tar is not a valid tar file \(the header at byte {header} is damaged\)"):
        ImageTars(str(path))
    path.write_bytes(sound[: header + 600])
    with pytest.raises(ValueError, match=r"a.tar is not a valid tar file \(unexpected end of data\)"):
        ImageTars(str(path))
    path.write_bytes(sound[:header])  # without the zeros at the end, as some programs leave it
    assert len(ImageTars(str(path))) == 1


def test_a_second_tar_behind_the_end_of_the_first_is_named(tmp_path: Path) -> None:
    first = Path(tar_of(tmp_path / "a.tar", {"a.jpg": PICTURE, "a.cls": b"1"}))
    second = Path(tar_of(tmp_path / "b.tar", {"b.jpg": PICTURE, "b.cls": b"1"}))
    second.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(
        ValueError, match=r"b.tar is not a valid tar file \(another tar begins at byte 10240, after its end\)"
    ):
        ImageTars(str(second))


def test_a_member_of_a_negative_size_ends_no_run_in_a_circle(tmp_path: Path) -> None:
    path = Path(tar_of(tmp_path / "a.tar", {"a.jpg": b"", "a.cls": b"1"}))
    content = bytearray(path.read_bytes())
    content[124:136] = (-512 & (2**96 - 1)).to_bytes(12, "big")  # in base 256, as GNU tar writes large numbers
    content[148:156] = b" " * 8
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.tar is not a valid tar file \(a.jpg has a negative size\)"):
        ImageTars(str(path))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.TAR.XZ"])
def test_a_compressed_tar_is_named_as_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(
        ValueError, match=rf"no .tar files in .*, but 1 compressed tar files, the first is {name}; .* unpack it"
    ):
        ImageTars(str(tmp_path))
    with pytest.raises(
        ValueError, match=rf"{name} is a file, but this source reads a folder; a compressed tar .* unpack it"
    ):
        ImageTars(str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"{name} is compressed, as are 1 of the tars there, .* unpack it to .tar"):
        ImageTars(f"{tmp_path}/*{name[1:]}")


def test_a_compressed_tar_of_a_series_is_refused_and_another_is_named(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    (tmp_path / "tars/devkit.tar.gz").write_bytes(b"\x1f\x8b")
    assert [entry.source_id for entry in ImageTars(str(tmp_path / "tars")).left_out] == ["devkit.tar.gz"]
    (tmp_path / "tars/train-2.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"tars/train-2.tar.gz is compressed, as are 1 of the tars there"):
        ImageTars(str(tmp_path / "tars"))
    with pytest.raises(
        ValueError, match=r"1 of 3 tars are missing in .*, the first is train-2.tar, but there is train-2.tar.gz"
    ):
        ImageTars(f"{tmp_path}/tars/train-{{0..2}}.tar")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\x1f\x8b\x08\x00", "is compressed with gzip, which cannot be read at random; unpack it"),
        (b"\x28\xb5\x2f\xfd", "is compressed with zstandard"),
        (b"\xfd7zXZ\x00", "is compressed with xz"),
        (b"PK\x03\x04", "is a zip file; rename it to .zip, for data/source=image_folder"),
        (LFS_POINTER, "is a Git LFS pointer and not the file itself; run `git lfs pull`"),
        (b"", "is not a valid tar file"),
    ],
)
def test_a_tar_that_is_something_else_is_told_apart(tmp_path: Path, head: bytes, words: str) -> None:
    (tmp_path / "a.tar").write_bytes(head + (b"" if head in (b"", LFS_POINTER) else bytes(range(256)) * 8))
    with pytest.raises(ValueError, match=f"a.tar {words}"):
        ImageTars(str(tmp_path))


def test_a_pattern_names_the_tars_and_one_that_matches_none_says_what_is_there(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    expected = contents(ImageTars(str(tmp_path / "tars")))
    assert contents(ImageTars(f"{tmp_path}/tars/*.tar")) == expected
    assert contents(ImageTars(f"{tmp_path}/tars/train-*.t*r")) == expected
    with pytest.raises(
        ValueError, match=r"No file in .*tars has a name like val-\*.tar, but 2 tar files, the first is train-0.tar"
    ):
        ImageTars(f"{tmp_path}/tars/val-*.tar")
    with pytest.raises(ValueError, match=r"names 2 folders, but the .tar files of a source lie in 1"):
        ImageTars(f"{tmp_path}/*/train-0.tar")
    (tmp_path / "tars/train-2.tar").symlink_to("gone")
    with pytest.raises(
        ValueError, match=r"1 of 3 tars are missing in .*, the first is train-2.tar, which is a link to nothing"
    ):
        ImageTars(f"{tmp_path}/tars/*.tar")
    (tmp_path / "tars/closed").mkdir()
    assert len(ImageTars(f"{tmp_path}/tars/train-{{0..1}}.tar")) == 10  # whatever else lies there


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.jpg", ", but 1 images, the first is a.jpg; read with data/source=image_folder data.source.root=PLACE."),
        ("a.parquet", ", but 1 parquet files, the first is a.parquet; read with data/source=parquet data.source.root="),
        (
            "a.zip",
            ", but 1 zip files, the first is a.zip; read one with data/source=image_folder data.source.root=PLACE/a",
        ),
        (
            "a.tfrecord",
            ", but 1 files of other libraries, the first is a.tfrecord; write the images into class folders.",
        ),
        ("a.md", "; is it the right folder?"),
    ],
)
def test_what_else_a_folder_holds_is_said_with_the_way_out(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x" * 20)
    (tmp_path / "README.md").write_text("x")
    sentence = f"There are no .tar files in {tmp_path}{words.replace('PLACE', str(tmp_path))}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        ImageTars(str(tmp_path))


def test_a_sample_larger_than_any_image_is_one_unreadable_image(tmp_path: Path) -> None:
    path = Path(tar_of(tmp_path / "a.tar", {"a.cls": b"1"}))
    size = 2**31 + 2
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(info.tobuf())
        file.truncate(1024 + 512 + size + 510 + 1024)  # a hole
    source = ImageTars(str(path))
    with pytest.raises(UnreadableImageError, match=f"it has {size} bytes, more than {2**31}"):
        source[0]


def test_latents_that_are_no_array_are_set_aside(tmp_path: Path) -> None:
    archive, huge = io.BytesIO(), io.BytesIO()
    np.savez(archive, x=np.zeros(3))
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f4", "fortran_order": False, "shape": (2**60,)})
    values = {"a": archive.getvalue(), "b": huge.getvalue(), "c": LFS_POINTER, "d": b"\x93NUMPY\x01\x00\x04\x00({,}"}
    members = {
        name: content for key in values for name, content in {f"{key}.npy": values[key], f"{key}.cls": b"0"}.items()
    }
    source = LatentTars(tar_of(tmp_path / "a.tar", members))
    for index in range(4):
        with pytest.raises(UnreadableImageError):
            source[index]
