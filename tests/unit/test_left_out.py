"""Files among the images of a folder that are not images are named; files of the operating system are not."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import InProcess
from pictures import encoded, make_image_folder, photo
from test_encode import encode_folder
from test_links import skipped
from test_sources import contents

from data.image_folder import ImageFolder
from data.images import UnreadableImageError, decode
from data.sources import load_images
from data.unread import image_suffixes
from evaluation.reference.image_sets import SourceImages
from model.autoencoder import IdentityAutoencoder

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HEIC = b"\x00\x00\x00\x18ftypheic" + bytes(100)


def named(source: ImageFolder) -> dict[str, bool]:
    return {entry.source_id: entry.is_image for entry in source.left_out}


@pytest.mark.parametrize("suffix", [".heic", ".HEIF", ".cr2", ".nef", ".arw", ".dng", ".svg", ".jxl"])
def test_an_image_in_a_format_that_is_not_read_is_named_and_counted(tmp_path: Path, suffix: str) -> None:
    root = make_image_folder(tmp_path / "root", 33)
    before = encode_folder(root, tmp_path / "before", IdentityAutoencoder(3))
    (root / f"ant/photo{suffix}").write_bytes(HEIC)
    after = encode_folder(root, tmp_path / "after", IdentityAutoencoder(3))  # 1 of 100 is what is allowed
    assert skipped(tmp_path / "after") == {f"ant/photo{suffix}": "its format is not read; convert it to JPEG or PNG"}
    assert (after.hash, after.num_skipped) == (before.hash, 0)  # the data that runs train on is the same
    (root / f"bee/photo{suffix}").write_bytes(HEIC)
    sentence = (
        r"2 of 101 images cannot be read, the last for 'its format is not read; .* max_skipped_fraction=0.01 allows"
    )
    with pytest.raises(ValueError, match=sentence):
        encode_folder(root, tmp_path / "third", IdentityAutoencoder(3))
    assert len(skipped(tmp_path / "third")) == 2
    assert not list((tmp_path / "third").glob("shard-*"))  # before any image was encoded


def test_a_folder_of_which_half_is_heic_fails_as_one_of_which_half_is_garbage(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 4)
    for path in sorted(root.rglob("*.JPEG"))[::2]:
        shutil.copy(path, path.with_suffix(".heic"))
        path.unlink()
    with pytest.raises(ValueError, match=r"6 of 12 images cannot be read"):
        encode_folder(root, tmp_path / "shards", IdentityAutoencoder(3))


def test_unreadable_images_and_those_of_other_formats_count_together(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 10)
    (root / "ant/000.JPEG").write_bytes(b"garbage")
    (root / "ant/x.heic").write_bytes(HEIC)
    manifest = encode_folder(root, tmp_path / "shards", IdentityAutoencoder(3), max_skipped_fraction=2 / 31)
    assert (manifest.num_samples, manifest.num_skipped) == (29, 1)
    assert skipped(tmp_path / "shards").keys() == {"ant/000.JPEG", "ant/x.heic"}
    with pytest.raises(ValueError, match=r"2 of 31 images cannot be read"):
        encode_folder(root, tmp_path / "fewer", IdentityAutoencoder(3), max_skipped_fraction=0.06)


def test_litter_is_passed_over_in_silence(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    before = ImageFolder(str(root))
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._000.JPEG", ".hidden.heic"):
        (root / "ant" / name).write_bytes(b"x")
    for folder in ("__MACOSX", ".ipynb_checkpoints", "lost+found", ".git", ".Trash-0"):
        (root / folder).mkdir()
        (root / folder / "000.JPEG").write_bytes(encoded(photo(0)))
    (root / ".empty").mkdir()
    after = ImageFolder(str(root))
    assert (after.class_names, after.fingerprint) == (before.class_names, before.fingerprint)
    assert after.left_out == []


def test_texts_and_tables_are_passed_over_and_a_folder_of_them_is_no_class(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    for name in (
        "README.md",
        "ant/000.txt",
        "ant/000.json",
        "annotations/ant.xml",
        "annotations/deeper/a.csv",
        "LICENSE",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")
    source = ImageFolder(str(root))
    assert source.class_names == ["ant", "bee", "cat"]
    assert source.left_out == []


def test_the_fingerprint_and_the_order_are_those_of_paths_and_sizes_alone(tmp_path: Path) -> None:
    """Compare with shards of an earlier version, which neither followed links nor named files: they are recognized."""
    for name, size in {"b/2.png": 3, "a/z.JPG": 5, "a/B.webp": 7, "a/deep/x.gif": 2, "a/notes.txt": 9}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    source = ImageFolder(str(tmp_path))
    listing = [["a/B.webp", 7], ["a/deep/x.gif", 2], ["a/z.JPG", 5], ["b/2.png", 3]]
    assert [name for name, _, _ in contents(source)] == [name for name, _ in listing]
    assert source.fingerprint == hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    assert source.fingerprint == "7bafde0d7cba387c5170ef3955a89762b891b2f01ae0909868bb346a4d56034a"


def test_a_class_folder_without_an_image_that_can_be_read_is_refused_by_name(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    (root / "dog").mkdir()
    (root / "aphid/deeper").mkdir(parents=True)
    (root / "aphid/deeper/1.heic").write_bytes(HEIC)
    sentence = (
        r"2 of 5 class folders in .*root have no image that can be read: aphid \(1.heic: its format is not read\), "
        r"dog \(is empty\); convert what is in them to JPEG or PNG, or remove them"
    )
    with pytest.raises(ValueError, match=sentence):
        ImageFolder(str(root))
    shutil.rmtree(root / "aphid")
    (root / "dog/.DS_Store").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"dog \(is empty\)"):
        ImageFolder(str(root))
    (root / "dog/1.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"dog \(1.mp4: a video is not read\)"):
        ImageFolder(str(root))
    (root / "dog/1.png").write_bytes(encoded(photo(0), "PNG"))
    assert ImageFolder(str(root)).class_names == ["ant", "bee", "cat", "dog"]


def test_images_without_class_folders_do_not_mind_other_folders(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(photo(0), "PNG"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.cr2").write_bytes(b"II*\x00")
    source = ImageFolder(str(tmp_path))
    assert source.class_names == ["images"]
    assert named(source) == {"raw/a.cr2": True}


def test_videos_and_archives_are_named_but_are_no_images(tmp_path: Path) -> None:
    """Add films of a second, which telephones store with each photo."""
    root = make_image_folder(tmp_path / "root", 2)
    for path in list(root.rglob("*.JPEG")):
        path.with_suffix(".MOV").write_bytes(b"x")
    (root / "backup.zip").write_bytes(b"x")
    (root / "bee/more.tar.gz").write_bytes(b"x")
    manifest = encode_folder(root, tmp_path / "shards", IdentityAutoencoder(3))
    assert manifest.num_samples == 6
    assert len(skipped(tmp_path / "shards")) == 6 + 2
    assert (
        skipped(tmp_path / "shards")["bee/more.tar.gz"] == "it is a compressed tar file, which is not read; unpack it"
    )
    assert not any(named(ImageFolder(str(root))).values())


@pytest.mark.parametrize("name", ["photo", "photo.jpg_large", "photo.jpeg.1", "photo.jpg.part", "photo.xyz"])
def test_an_image_whose_name_does_not_say_so_is_named_and_anything_else_is_not(tmp_path: Path, name: str) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    (root / "ant" / name).write_bytes(encoded(photo(0)))
    (root / "bee" / name).write_bytes(b"a text of some length that is no image")
    source = ImageFolder(str(root))
    assert named(source) == {f"ant/{name}": True}
    assert "it is a JPEG image, but its suffix is another; rename it" in source.left_out[0].reason


@pytest.mark.parametrize(
    ("head", "title"),
    [
        (encoded(photo(0), "PNG"), "PNG"),
        (encoded(photo(0), "GIF"), "GIF"),
        (encoded(photo(0), "WEBP"), "WebP"),
        (encoded(photo(0), "TIFF"), "TIFF"),
        (encoded(photo(0), "AVIF"), "HEIF or AVIF"),
        (encoded(photo(0), "JPEG2000"), "JPEG 2000"),
    ],
)
def test_formats_are_told_by_their_first_bytes(tmp_path: Path, head: bytes, title: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(photo(0), "PNG"))
    (tmp_path / "b").write_bytes(head)
    assert [entry.reason for entry in ImageFolder(str(tmp_path)).left_out] == [
        f"it is a {title} image, but its suffix is another; rename it"
    ]


def test_photos_that_lie_in_a_cloud_are_named(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    (root / "ant/.IMG_1.jpg.icloud").write_bytes(b"bplist")
    assert named(ImageFolder(str(root))) == {"ant/.IMG_1.jpg.icloud": True}


def test_pointers_of_git_lfs_in_place_of_images_say_so(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    for path in root.rglob("*.JPEG"):
        path.write_bytes(LFS_POINTER)
    with pytest.raises(
        ValueError, match=r"of 6 images cannot be read, the last for 'the file is a Git LFS pointer .* `git lfs pull`"
    ):
        encode_folder(root, tmp_path / "shards", IdentityAutoencoder(3))
    with pytest.raises(UnreadableImageError, match="git lfs pull"):
        decode(LFS_POINTER)


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "root/train", 2)
    make_image_folder(tmp_path / "root/val", 2)
    sentence = (
        r"root holds train, val, which are parts of a data set, not classes; give one, data.source.root=.*root/train"
    )
    with pytest.raises(ValueError, match=sentence):
        ImageFolder(str(tmp_path / "root"))
    make_image_folder(tmp_path / "vehicles", 2, ("bus", "train"))  # a train is a vehicle
    assert ImageFolder(str(tmp_path / "vehicles")).class_names == ["bus", "train"]
    make_image_folder(tmp_path / "trains", 2, ("train",))
    assert ImageFolder(str(tmp_path / "trains")).class_names == ["train"]


def test_a_folder_of_folders_is_one_class_and_a_note_says_so(tmp_path: Path, in_process: InProcess) -> None:
    make_image_folder(tmp_path / "root/photos", 2)
    (tmp_path / "root/photos/ant/x.mp4").write_bytes(b"x")
    words = ["data/source=image_folder", "model/autoencoder=identity", "data/crop=center", "data.name=photos"]
    shown = in_process("encode", *words, "data.source.root=root", "data.image_size=8", "data.shards=shards")
    assert "6 samples of 1 classes in 1 shards" in shown
    assert "note: All images lie in 3 folders of root/photos, which is 1 class; if they are the classes" in shown
    assert "note: 1 files of the source are left out; the first is photos/ant/x.mp4: a video is not read." in shown
    shown = in_process("encode", *words, "data.source.root=root/photos", "data.image_size=8", "data.shards=three")
    assert "6 samples of 3 classes in 1 shards" in shown


def test_statistics_of_all_images_are_refused_where_one_is_left_out(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    (root / "ant/film.mov").write_bytes(b"x")
    assert len(SourceImages(ImageFolder(str(root)), 40)) == 6
    (root / "ant/x.heic").write_bytes(HEIC)
    sentence = r"Image ant/x.heic of image folder cannot be read \(its format is not read.*; remove it"
    for refuses in (SourceImages, load_images):
        with pytest.raises(ValueError, match=sentence):
            refuses(ImageFolder(str(root)), 40)
    (root / "ant/x.heic").unlink()
    (root / "ant/000.JPEG").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"Image ant/000.JPEG of image folder cannot be read \(UnidentifiedImageError"):
        load_images(ImageFolder(str(root)), 40)


def test_every_suffix_that_pillow_reads_is_an_image_in_any_case(tmp_path: Path) -> None:
    for number, suffix in enumerate(image_suffixes()):
        (tmp_path / "ant").mkdir(exist_ok=True)
        (tmp_path / f"ant/{number}{suffix.upper()}").write_bytes(b"x")
    source = ImageFolder(str(tmp_path))
    assert len(source) == len(image_suffixes())
    assert source.left_out == []


def test_an_image_that_would_fill_the_memory_is_set_aside_without_being_read(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    with (root / "ant/000.JPEG").open("r+b") as file:
        file.truncate(2**40)  # a hole
    with pytest.raises(UnreadableImageError, match=f"has {2**40} bytes, but at most {2**31} are read"):
        ImageFolder(str(root))[0]
