"""Links are followed in every source; entries that are not files are named and never opened."""

import json
import os
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
from pictures import encoded, make_image_folder, photo
from test_encode import encode_folder
from test_sources import contents, hugging_face_dataset, make_tars

from data.hugging_face import ParquetImages, SavedDataset
from data.image_folder import ImageFolder
from data.local_tree import MAX_WAYS
from data.shards import MappedShards
from data.tars import ImageTars, LatentTars
from model.autoencoder import IdentityAutoencoder


def link(path: Path, target: Path | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def skipped(folder: Path) -> dict[str, str]:
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return {line["source_id"]: line["reason"] for line in map(json.loads, lines)}


def test_three_linked_images_and_a_real_one_are_four_samples_of_two_classes(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(photo(number), "PNG"))
    link(tmp_path / "root/ant/a.png", tmp_path / "0.png")
    link(tmp_path / "root/ant/b.png", "../../1.png")
    link(tmp_path / "root/bee/c.png", tmp_path / "2.png")
    (tmp_path / "root/bee/d.png").write_bytes(encoded(photo(3), "PNG"))
    manifest = encode_folder(tmp_path / "root", tmp_path / "shards", IdentityAutoencoder(3))
    assert (manifest.num_samples, manifest.class_names) == (4, ["ant", "bee"])
    assert sorted(MappedShards(tmp_path / "shards").source_ids) == ["ant/a.png", "ant/b.png", "bee/c.png", "bee/d.png"]
    assert contents(ImageFolder(str(tmp_path / "root"))) == [
        (f"{name}.png", encoded(photo(number), "PNG"), label)
        for number, (name, label) in enumerate([("ant/a", 0), ("ant/b", 0), ("bee/c", 1), ("bee/d", 1)])
    ]


def test_a_linked_class_folder_is_a_class_and_links_in_it_are_followed(tmp_path: Path) -> None:
    root, elsewhere = make_image_folder(tmp_path / "root", 2), make_image_folder(tmp_path / "elsewhere", 3, ("x",))
    link(elsewhere / "x/deeper", tmp_path / "root/ant")
    link(root / "dog", elsewhere / "x")
    source = ImageFolder(str(root))
    assert source.class_names == ["ant", "bee", "cat", "dog"]
    assert [source[index].label for index in range(len(source))].count(3) == 3 + 2
    assert source.left_out == []


def test_a_root_that_is_a_link_is_the_folder_itself(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    link(tmp_path / "link", root)
    assert contents(ImageFolder(str(tmp_path / "link"))) == contents(ImageFolder(str(root)))
    assert ImageFolder(str(tmp_path / "link")).fingerprint == ImageFolder(str(root)).fingerprint


def test_links_that_lead_in_a_circle_are_named_and_end(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    link(root / "ant/up", root)
    link(root / "ant/self", root / "ant")
    link(root / "bee/cats", root / "cat")
    link(root / "cat/bees", root / "bee")
    link(root / "cat/one.png", "two.png")
    link(root / "cat/two.png", "one.png")
    source = ImageFolder(str(root))
    assert len(source) == 6 + 2 + 2  # each of bee and cat once more, below the other
    found = {entry.source_id: entry for entry in source.left_out}
    circles = {"ant/up", "ant/self", "bee/cats/bees", "cat/bees/cats"}
    assert {name for name in found if found[name].reason == "it is a link to a folder that contains it"} == circles
    assert {name for name in found if found[name].is_image} == {
        f"{folder}/{name}.png" for folder in ("cat", "bee/cats") for name in ("one", "two")
    }
    assert "cannot be followed (Too many levels of symbolic links)" in found["cat/one.png"].reason


def test_links_that_multiply_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    """Link each of 40 folders to the next twice: 2^40 paths lead to the last."""
    for number in range(40):
        for name in ("left", "right"):
            link(tmp_path / f"root/{number}/{name}", tmp_path / f"root/{number + 1}")
    (tmp_path / "root/40").mkdir()
    (tmp_path / "root/40/a.png").write_bytes(encoded(photo(0), "PNG"))
    with pytest.raises(ValueError, match=f"is reached by more than {MAX_WAYS} paths through links; remove some"):
        ImageFolder(str(tmp_path / "root"))


def test_links_to_nothing_are_set_aside_by_name_and_count_as_unreadable_images(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 10)
    link(root / "ant/gone.jpg", "../.git/annex/objects/x.jpg")
    link(root / "bee/more", tmp_path / "unmounted")
    link(root / "bee/notes.txt", tmp_path / "unmounted")
    link(root / "bee/.hidden.jpg", tmp_path / "unmounted")
    manifest = encode_folder(root, tmp_path / "shards", IdentityAutoencoder(3), max_skipped_fraction=0.07)
    assert (manifest.num_samples, manifest.num_skipped) == (30, 0)  # rows of the plan alone
    assert skipped(tmp_path / "shards") == {
        "ant/gone.jpg": "it is a link to nothing (../.git/annex/objects/x.jpg)",
        "bee/more": f"it is a link to nothing ({tmp_path}/unmounted)",
        "bee/notes.txt": f"it is a link to nothing ({tmp_path}/unmounted)",
    }
    with pytest.raises(ValueError, match=r"2 of 32 images cannot be read, the last for 'it is a link to nothing"):
        encode_folder(root, tmp_path / "fewer", IdentityAutoencoder(3), max_skipped_fraction=0.06)


def test_a_class_folder_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    link(root / "dog", tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"1 of 4 class folders .* dog \(is a link to nothing \(.*unmounted\)\)"):
        ImageFolder(str(root))


def test_pipes_sockets_and_devices_are_set_aside_by_name_and_never_opened(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    os.mkfifo(root / "ant/pipe.jpg")
    link(root / "ant/zeros.png", "/dev/zero")
    here = Path.cwd()
    os.chdir(root / "bee")  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
    finally:
        os.chdir(here)
    source = ImageFolder(str(root))
    assert len(source) == 6
    assert [(entry.source_id, entry.reason, entry.is_image) for entry in source.left_out] == [
        ("ant/pipe.jpg", "it is a named pipe", True),
        ("ant/zeros.png", "it is a device", True),
        ("bee/socket", "it is a socket", False),
    ]


def test_an_empty_folder_with_the_name_of_an_image_is_an_image_left_out(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", 2)
    (root / "ant/lost.png").mkdir()
    (root / "bee/more.png").mkdir()
    (root / "bee/000.JPEG").rename(root / "bee/more.png/000.JPEG")
    (root / "bee/empty").mkdir()
    source = ImageFolder(str(root))
    assert len(source) == 6
    assert [(entry.source_id, entry.reason, entry.is_image) for entry in source.left_out] == [
        ("ant/lost.png", "it is an empty folder", True)
    ]


def test_an_image_that_becomes_a_pipe_after_it_was_listed_is_one_unreadable_image(tmp_path: Path) -> None:
    from data.images import UnreadableImageError

    root = make_image_folder(tmp_path / "root", 2)
    source = ImageFolder(str(root))
    (root / "ant/000.JPEG").unlink()
    os.mkfifo(root / "ant/000.JPEG")
    with pytest.raises(UnreadableImageError, match="is a named pipe, but it must be a file"):
        source[0]


def test_linked_tars_and_parquet_and_arrow_files_are_read(tmp_path: Path) -> None:
    tars = make_tars(tmp_path / "tars")
    for path in tars.iterdir():
        link(tmp_path / "linked" / path.name, path)
    expected = contents(ImageTars(str(tars)))
    assert contents(ImageTars(str(tmp_path / "linked"))) == expected
    assert contents(ImageTars(f"{tmp_path}/linked/train-{{0..1}}.tar")) == expected
    dataset = hugging_face_dataset()
    dataset.to_parquet(str(tmp_path / "blobs/a1b2"))
    link(tmp_path / "hub/data/train-0.parquet", "../../blobs/a1b2")
    assert len(ParquetImages(str(tmp_path / "hub"))) == 20
    dataset.save_to_disk(str(tmp_path / "saved"))
    link(tmp_path / "elsewhere", tmp_path / "saved")
    assert len(SavedDataset(str(tmp_path / "elsewhere"))) == 20
    with webdataset.TarWriter(str(tmp_path / "latents.bin")) as writer:
        writer.write({"__key__": "0", "npy": np.zeros((4, 8, 8), np.float16), "cls": 0})
    link(tmp_path / "latents/a.tar", tmp_path / "latents.bin")
    assert len(LatentTars(str(tmp_path / "latents"))) == 1


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
def test_a_tar_parquet_or_arrow_file_that_is_no_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make_tars(tmp_path / "tar")
    (tmp_path / "parquet").mkdir()
    hugging_face_dataset().to_parquet(str(tmp_path / "parquet/a.parquet"))
    hugging_face_dataset().save_to_disk(str(tmp_path / "arrow"))
    read = {"tar": ImageTars, "parquet": ParquetImages, "arrow": SavedDataset}[kind]
    read(str(tmp_path / kind))
    link(tmp_path / kind / f"z.{kind}", "gone")
    with pytest.raises(ValueError, match=rf"z.{kind} is a link to nothing \(gone\); repair it, or remove it"):
        read(str(tmp_path / kind))
    (tmp_path / kind / f"z.{kind}").unlink()
    os.mkfifo(tmp_path / kind / f"z.{kind}")
    with pytest.raises(ValueError, match=rf"z.{kind} is a named pipe; repair it, or remove it"):
        read(str(tmp_path / kind))


def hub_cache(folder: Path) -> Path:
    """Write images as huggingface_hub caches a data set, links by name to blobs by hash; return its cache folder."""
    revision = folder / "snapshots/0123abcd"
    for class_name in ("ant", "bee"):
        for number in range(2):
            blob = folder / f"blobs/{class_name}{number}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(encoded(photo(number)))
            link(revision / f"train/{class_name}/{number}.jpg", f"../../../../blobs/{blob.name}")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0123abcd")
    return folder


def test_a_folder_of_the_hubs_cache_is_read_and_its_root_is_told_apart(tmp_path: Path) -> None:
    cache = hub_cache(tmp_path / "datasets--someone--insects")
    source = ImageFolder(str(cache / "snapshots/0123abcd/train"))
    assert source.class_names == ["ant", "bee"]
    assert contents(source)[1] == ("ant/1.jpg", encoded(photo(1)), 0)
    with pytest.raises(
        ValueError,
        match=r"cache folder of the Hugging Face hub with 1 revisions; give one of them, .*/snapshots/0123abcd",
    ):
        ImageFolder(str(cache))
    with pytest.raises(ValueError, match=r"cache folder of the Hugging Face hub"):
        ParquetImages(str(cache))
    with pytest.raises(
        ValueError,
        match=r"holds train, which are parts of a data set.*; give one, data.source.root=.*/0123abcd/train",
    ):
        ImageFolder(str(cache / "snapshots/0123abcd"))


def test_datasets_reads_the_same_images_through_the_links(tmp_path: Path) -> None:
    cache = hub_cache(tmp_path / "datasets--someone--insects")
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(cache / "snapshots/0123abcd"), split="train", cache_dir=str(tmp_path / "x")
    )
    ours = ImageFolder(str(cache / "snapshots/0123abcd/train"))
    assert theirs["label"] == [label for _, _, label in contents(ours)]
