"""Data in a form that a source does not read is never called absent: one sentence names it and the way out."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pyarrow
import pytest
from pictures import encoded, make_image_folder, photo
from pyarrow import parquet
from s3_server import BUCKET, s3_server
from test_left_out import LFS_POINTER
from test_sources import contents, hugging_face_dataset, make_tars

from data.files import Files
from data.hugging_face import ParquetImages, SavedDataset
from data.image_folder import ImageFolder
from data.images import UnreadableImageError
from data.tars import ImageTars

PICTURE = encoded(photo(0))
CLASSES = {"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}}


def table_of(images: Any, names: tuple[str, ...] = ("ant", "bee")) -> pyarrow.Table:
    described = {"info": {"features": {"label": {"names": list(names)}}}}
    table = pyarrow.table({"image": images, "label": [index % 2 for index in range(len(images))]})
    return table.replace_schema_metadata({"huggingface": json.dumps(described)})


@pytest.mark.parametrize(
    "images",
    [
        [{"bytes": PICTURE, "path": "a.jpg"}] * 2,
        [{"bytes": PICTURE}] * 2,
        [PICTURE] * 2,
        pyarrow.array([PICTURE] * 2, pyarrow.large_binary()),
    ],
)
def test_images_in_parquet_are_structs_or_bytes(tmp_path: Path, images: Any) -> None:
    parquet.write_table(table_of(images), tmp_path / "a.PARQUET")
    assert contents(ParquetImages(str(tmp_path))) == [("row-00000000", PICTURE, 0), ("row-00000001", PICTURE, 1)]


def test_parquet_that_names_0_classes_is_as_one_that_names_none(tmp_path: Path) -> None:
    parquet.write_table(table_of([PICTURE] * 2, names=()), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="The files do not name the classes of the column 'label'"):
        ParquetImages(str(tmp_path))


def test_paths_or_pixels_in_parquet_are_not_taken_for_images(tmp_path: Path) -> None:
    parquet.write_table(table_of(["a.jpg", "b.jpg"]), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a.parquet has paths in the column 'image' \(string\) and not the images; write"
    ):
        ParquetImages(str(tmp_path))
    parquet.write_table(table_of([[1, 2], [3, 4]]), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a.parquet has values of type list<.*> in the column 'image', but images are read as"
    ):
        ParquetImages(str(tmp_path))
    rows = pyarrow.array(
        [{"bytes": None, "path": "a.jpg"}], pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    )
    parquet.write_table(table_of(rows), tmp_path / "a.parquet")
    with pytest.raises(
        UnreadableImageError, match=r"the row holds no bytes of an image, but the path 'a.jpg'; write the data set"
    ):
        ParquetImages(str(tmp_path))[0]


def test_one_parquet_file_or_those_of_a_pattern_are_read(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        parquet.write_table(table_of([name.encode()] * 2), tmp_path / f"{name}.parquet")
    assert len(ParquetImages(str(tmp_path))) == 6
    assert contents(ParquetImages(f"{tmp_path}/test-0.parquet")) == [
        ("row-00000000", b"test-0", 0),
        ("row-00000001", b"test-0", 1),
    ]
    assert [content for _, content, _ in contents(ParquetImages(f"{tmp_path}/train-*.parquet"))] == [b"train-0"] * 2 + [
        b"train-1"
    ] * 2
    with pytest.raises(ValueError, match=r"1 of 2 files are missing in .*, the first is train-2.parquet"):
        ParquetImages(f"{tmp_path}/train-{{0,2}}.parquet")
    (tmp_path / "spark.parquet").mkdir()  # a folder that is named like a file
    parquet.write_table(table_of([b"x"]), tmp_path / "spark.parquet/part-0.parquet")
    assert len(ParquetImages(f"{tmp_path}/spark.parquet")) == 1


def test_one_parquet_file_in_a_store_is_read(tmp_path: Path) -> None:
    parquet.write_table(table_of([b"a", b"b"]), tmp_path / "a.parquet")
    with s3_server():
        for key in ("set/a.parquet", "set/b.parquet", "spark.parquet/part-0.parquet"):
            boto3.client("s3").upload_file(str(tmp_path / "a.parquet"), BUCKET, key)
        assert len(ParquetImages(f"s3://{BUCKET}/set/a.parquet")) == 2
        assert len(ParquetImages(f"s3://{BUCKET}/set")) == 4
        assert len(ParquetImages(f"s3://{BUCKET}/spark.parquet")) == 2
        with pytest.raises(
            ValueError, match=r"set/a.parquet is a file, but this source reads a folder; read with data/source=parquet"
        ):
            ImageFolder(f"s3://{BUCKET}/set/a.parquet")


def test_parquet_files_that_disagree_are_refused(tmp_path: Path) -> None:
    parquet.write_table(table_of([b"a", b"b"]), tmp_path / "a.parquet")
    parquet.write_table(table_of([b"a", b"b"], ("bee", "ant")), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet names 2 classes that differ from the 2 of a.parquet"):
        ParquetImages(str(tmp_path))
    parquet.write_table(pyarrow.table({"image": [b"a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet has no column 'label', but image"):
        ParquetImages(str(tmp_path))
    (tmp_path / "a.parquet").unlink()
    parquet.write_table(table_of(pyarrow.array([], pyarrow.binary())), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"The 1 files of .* have 0 rows"):
        ParquetImages(str(tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_parquet_or_arrow_file_is_named(tmp_path: Path, kind: str) -> None:
    read: Callable[[str], Any] = {"parquet": ParquetImages, "arrow": SavedDataset}[kind]
    (tmp_path / "set").mkdir()
    if kind == "parquet":
        hugging_face_dataset().to_parquet(str(tmp_path / "set/a.parquet"))
    else:
        hugging_face_dataset().save_to_disk(str(tmp_path / "set"))
    (path,) = (tmp_path / "set").glob(f"*.{kind}")
    sound = path.read_bytes()
    for content in (b"", b"x" * 2000, sound[: len(sound) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"set/{path.name} cannot be read \(.*\); fetch or make it again"):
            read(str(tmp_path / "set"))
    path.write_bytes(LFS_POINTER)
    with pytest.raises(
        ValueError, match=rf"set/{path.name} is a Git LFS pointer and not the file itself; run `git lfs pull`"
    ):
        read(str(tmp_path / "set"))
    path.write_bytes(sound)
    assert len(read(str(tmp_path / "set"))) == 20


def test_a_row_group_that_was_damaged_names_its_file(tmp_path: Path) -> None:
    parquet.write_table(
        table_of([bytes([index]) * 5000 for index in range(4)]), tmp_path / "a.parquet", compression="zstd"
    )
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[20:40] = bytes(20)
    (tmp_path / "a.parquet").write_bytes(content)
    source = ParquetImages(str(tmp_path))
    with pytest.raises(ValueError, match=r"a.parquet cannot be read \(.*\); fetch or make it again"):
        source[0]


def test_arrows_file_format_is_read_as_its_stream_format_is(tmp_path: Path) -> None:
    table = table_of([PICTURE] * 3)
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert [label for _, _, label in contents(SavedDataset(str(tmp_path)))] == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.jpg", "is a file, but this source reads a folder; give the folder that contains it, FOLDER."),
        ("a.tar", "is a file, .*; read with data/source=image_tars data.source.tars=FOLDER/a.tar, or unpack"),
        ("a.parquet", "is a file, .*; read with data/source=parquet data.source.root=FOLDER/a.parquet."),
        ("a.arrow", "is a file, .*; read with data/source=saved_dataset data.source.root=FOLDER."),
        ("a.tgz", "is a file, .*; a compressed tar cannot be read at random, so unpack it"),
        ("a.heic", "is a file, .*; convert to JPEG or PNG."),
    ],
)
def test_a_file_given_as_the_root_is_told_from_a_folder(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{name} {words.replace('FOLDER', re.escape(str(tmp_path)))}"):
        ImageFolder(str(tmp_path / name))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["n01.tar", "n02.tar"],
            ", but 2 tar files, the first is n01.tar; read with data/source=image_tars data.source",
        ),
        (
            ["data/train-0.parquet"],
            ", but 1 parquet files, the first is data/train-0.parquet; read with data/source=parquet",
        ),
        (
            ["a.tar.zst", "b.tar.zst"],
            ", but 2 compressed tar files, the first is a.tar.zst; a compressed tar cannot be read",
        ),
        (
            ["a/1.heic", "b/2.HEIC", "x.tar"],
            ", but 2 images in formats that are not read, the first is a/1.heic; convert",
        ),
        (
            ["images.zip"],
            ", but 1 zip files, the first is images.zip; read one with data/source=image_folder data.source",
        ),
        (["cats.7z"], ", but 1 compressed files, the first is cats.7z; unpack first"),
        (["images.dvc"], ", but 1 names of files that lie elsewhere, the first is images.dvc; fetch what they name"),
        (["ant/.a.jpg.icloud"], ", but 1 names of files that lie elsewhere, the first is ant/.a.jpg.icloud; fetch"),
        (["a.txt"], "; point data.source.root to the folder that holds one folder of images per class"),
    ],
)
def test_a_folder_without_images_says_what_it_holds(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    sentence = f"There are no images among the {len(names)} files in {tmp_path}{words}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ImageFolder(str(tmp_path))


def test_a_folder_of_links_to_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("gone")
    with pytest.raises(
        ValueError,
        match=r", but 1 broken links, pipes or devices, the first is a.jpg, which is a link to nothing \(gone\)",
    ):
        ImageFolder(str(tmp_path))


def test_tars_and_parquet_files_in_folders_below_are_read(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    (tmp_path / "tars/deep").mkdir()
    (tmp_path / "tars/train-0.tar").rename(tmp_path / "tars/deep/train-0.tar")
    assert len(ImageTars(str(tmp_path / "tars"))) == 10


def test_a_home_folder_is_known_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image_folder(tmp_path / "photos", 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(ImageFolder("~/photos")) == 6


@pytest.mark.parametrize("root", [None, ""])
def test_a_root_that_was_left_empty_is_missing(root: str | None) -> None:
    with pytest.raises(ValueError, match=r"data.source.root is missing; give it as data.source.root=PATH"):
        ImageFolder(root)


def test_a_place_that_is_not_there_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"There are no files in .*absent \(No such file or directory\); is it the right folder"
    ):
        Files(str(tmp_path / "absent"))
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match=r"There are no files in .*circle \(Too many levels of symbolic links\)"):
        Files(str(tmp_path / "circle"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"There are no files in .*empty; is it the right folder"):
        Files(str(tmp_path / "empty"))


def test_a_folder_in_a_store_says_what_it_does_not_read(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images", 2)
    (root / "ant/x.heic").write_bytes(b"x")
    (root / "ant/.DS_Store").write_bytes(b"x")
    (root / "ant/labels").write_bytes(b"x")
    (root / "dog").mkdir()
    (root / "dog/1.heic").write_bytes(b"x")
    with s3_server():
        client = boto3.client("s3")
        for path in root.rglob("*.*"):
            client.upload_file(str(path), BUCKET, str(path.relative_to(tmp_path)))
        client.upload_file(str(root / "ant/labels"), BUCKET, "images/ant/labels")
        with pytest.raises(ValueError, match=r"1 of 4 class folders in s3://.* dog \(1.heic: its format is not read\)"):
            ImageFolder(f"s3://{BUCKET}/images")
        client.delete_object(Bucket=BUCKET, Key="images/dog/1.heic")
        from s3fs import S3FileSystem

        S3FileSystem.clear_instance_cache()
        source = ImageFolder(f"s3://{BUCKET}/images")
        assert [(entry.source_id, entry.is_image) for entry in source.left_out] == [
            ("ant/labels", False),
            ("ant/x.heic", True),
        ]
