"""Images are read with their labels from folders, tars, parquet files and saved datasets, local or remote."""

import functools
import http.server
import io
import tarfile
import threading
from pathlib import Path
from typing import Any

import boto3
import datasets
import numpy as np
import pytest
import webdataset
from pictures import encoded, make_image_folder, photo
from s3_server import BUCKET, s3_server

from core.draws import Philox
from data.hugging_face import ParquetImages, SavedDataset
from data.image_folder import ImageFolder
from data.images import CenterCrop, UnreadableImageError, decode
from data.plan import encoding_order
from data.sources import Source, load_images
from data.tars import ImageTars, LatentTars


def contents(source: Source) -> list[tuple[str, bytes, int]]:
    return [tuple(source[index])[:3] for index in range(len(source))]  # type: ignore[misc]


def test_a_folder_has_sorted_classes_and_images_and_ignores_other_files(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images", per_class=3)
    (root / "README.txt").write_text("not an image")
    (root / "bee" / ".hidden.jpg").write_bytes(b"x")
    (root / "bee" / "deeper").mkdir()
    (root / "bee" / "deeper" / "a.png").write_bytes(encoded(photo(9), "PNG"))
    source = ImageFolder(str(root))
    assert source.class_names == ["ant", "bee", "cat"]
    ids = [source[index].source_id for index in range(len(source))]
    assert ids[:4] == ["ant/000.JPEG", "ant/001.JPEG", "ant/002.JPEG", "bee/000.JPEG"]  # equal names in other classes
    assert "bee/deeper/a.png" in ids
    assert len(ids) == len(set(ids)) == 10
    assert [source[index].label for index in range(len(source))] == [0] * 3 + [1] * 4 + [2] * 3
    assert source[0].content == (root / "ant" / "000.JPEG").read_bytes()


def test_the_fingerprint_of_a_folder_tells_of_a_new_or_another_image(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images", per_class=2)
    before = ImageFolder(str(root)).fingerprint
    assert ImageFolder(str(root)).fingerprint == before
    (root / "ant" / "000.JPEG").write_bytes(encoded(photo(7), "PNG"))
    changed = ImageFolder(str(root)).fingerprint
    assert changed != before
    (root / "ant" / "new.JPEG").write_bytes(b"x")
    assert ImageFolder(str(root)).fingerprint not in (before, changed)


def test_images_without_class_folders_are_one_class(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(photo(0), "PNG"))
    source = ImageFolder(str(tmp_path))
    assert source.class_names == ["images"]
    assert source[0].label == 0


def test_folders_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There are no files in"):
        ImageFolder(str(tmp_path / "absent"))
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(ValueError, match="no images among the 1 files"):
        ImageFolder(str(tmp_path))
    make_image_folder(tmp_path, per_class=2)
    (tmp_path / "loose.png").write_bytes(encoded(photo(0), "PNG"))
    with pytest.raises(ValueError, match=r"1 of 7 images in .* lie outside the class folders, the first is loose.png"):
        ImageFolder(str(tmp_path))
    with pytest.raises(ValueError, match=r"data.source.root is missing"):
        ImageFolder(None)


def test_a_file_that_vanished_is_one_unreadable_image(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=2)
    source = ImageFolder(str(root))
    (root / "ant" / "001.JPEG").unlink()
    with pytest.raises(UnreadableImageError, match="FileNotFoundError"):
        source[1]


def make_tars(folder: Path, count: int = 10, suffix: str = "jpg") -> Path:
    folder.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"train-{number}.tar"), mtime=0) as writer:
            for index in range(count // 2):  # the same keys in both tars
                content = encoded(photo(10 * number + index))
                writer.write({"__key__": f"n{index:03d}", suffix: content, "cls": index % 3, "json": {"x": 1}})
    return folder


def test_tars_are_read_at_random_and_may_have_equal_keys(tmp_path: Path) -> None:
    folder = make_tars(tmp_path / "tars")
    for place in (str(folder), f"{folder}/train-{{0..1}}.tar"):
        source = ImageTars(place)
        assert source.class_names == ["0", "1", "2"]
        found = contents(source)
        assert len({source_id for source_id, _, _ in found}) == 10
        assert found[7] == ("train-1.tar/n002", encoded(photo(12)), 2)


def test_a_tar_ends_where_a_key_or_label_cannot_be_right(tmp_path: Path) -> None:
    def tar(name: str, members: dict[str, bytes] | list[tuple[str, bytes]]) -> str:
        with tarfile.open(tmp_path / name, "w") as file:
            for member, content in members.items() if isinstance(members, dict) else members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
        return str(tmp_path / name)

    with pytest.raises(ValueError, match=r"a.tar has x without a .cls"):
        ImageTars(tar("a.tar", {"x.jpg": b"1"}))
    with pytest.raises(ValueError, match=r"b.tar has x.cls b'seven', but a label is a whole number"):
        ImageTars(tar("b.tar", {"x.jpg": b"1", "x.cls": b"seven"}))
    with pytest.raises(ValueError, match=r"c.tar has x.jpg twice"):
        ImageTars(tar("c.tar", [("x.jpg", b"1"), ("x.cls", b"1"), ("x.jpg", b"2")]))
    with pytest.raises(ValueError, match=r"There are no samples"):
        ImageTars(tar("d.tar", {"x.txt": b"1"}))
    (tmp_path / "e.tar").write_bytes(b"garbage" * 1000)
    with pytest.raises(ValueError, match=r"e.tar is not a valid tar file"):
        ImageTars(str(tmp_path / "e.tar"))
    tar("a-0.tar", {"x.jpg": b"1", "x.cls": b"0"})
    with pytest.raises(ValueError, match=r"1 of 2 tars are missing in .*, the first is a-1.tar"):
        ImageTars(f"{tmp_path}/a-{{0..1}}.tar")


def hugging_face_dataset(count: int = 20) -> Any:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = {
        "image": [{"bytes": encoded(photo(index)), "path": f"{index}.jpg"} for index in range(count)],
        "label": [index % 2 for index in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_parquet_files_and_saved_datasets_give_the_images_that_datasets_wrote(tmp_path: Path) -> None:
    dataset = hugging_face_dataset()
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(str(tmp_path / "parquet/train-0.parquet"), batch_size=6)
    dataset.save_to_disk(str(tmp_path / "saved"))
    parquet, saved = ParquetImages(str(tmp_path / "parquet")), SavedDataset(str(tmp_path / "saved"))
    assert parquet.block_sizes == [6, 6, 6, 2]
    for source in (parquet, saved):
        assert source.class_names == ["ant", "bee"]
        assert contents(source) == [(f"row-{i:08d}", encoded(photo(i)), i % 2) for i in range(20)]


def test_parquet_of_another_kind_is_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"picture": [b"x"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has no column 'image', but picture, label"):
        ParquetImages(str(tmp_path))
    with pytest.raises(ValueError, match="do not name the classes of the column 'label'"):
        ParquetImages(str(tmp_path), image_column="picture")
    with pytest.raises(ValueError, match=r"There are no .arrow files"):
        SavedDataset(str(tmp_path))


def test_blocks_are_permuted_whole_and_mixed_within_runs_of_a_shards_size() -> None:
    sizes = [7, 5, 8, 6, 9, 4, 1] * 3
    order = encoding_order(Philox(0), sum(sizes), sizes, samples_per_shard=16)
    assert sorted(order) == list(range(sum(sizes)))
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    for first in range(0, len(order), 16):
        assert len(set(block_of[order[first : first + 16]])) <= 12  # of 21: two runs of blocks at most
    assert (np.diff(block_of[order]) != 0).mean() > 0.5
    assert not np.array_equal(order, encoding_order(Philox(1), sum(sizes), sizes, samples_per_shard=16))


def test_images_of_a_folder_load_as_one_array(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=2)
    images, labels = load_images(ImageFolder(str(root)), 32, CenterCrop())
    assert images.shape == (6, 32, 32, 3)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    first = decode((root / "ant/000.JPEG").read_bytes())
    np.testing.assert_array_equal(images[0], CenterCrop()(first, 32))


def test_latents_come_out_of_tars(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((4, 4, 8, 8)).astype(np.float16)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for index, latent in enumerate(latents):
            writer.write({"__key__": f"{index}", "npy": latent, "cls": index})
        writer.write({"__key__": "bad", "npy": b"no array", "cls": 0})
    source = LatentTars(str(tmp_path))
    for index, latent in enumerate(latents):
        np.testing.assert_array_equal(source[index].content, latent)
        assert source[index].label == index
    with pytest.raises(UnreadableImageError):
        source[4]


def test_folders_and_tars_are_read_from_s3(tmp_path: Path) -> None:
    root, tars = make_image_folder(tmp_path / "images", per_class=2), make_tars(tmp_path / "tars")
    with s3_server():
        client = boto3.client("s3")
        for path in [*root.rglob("*.JPEG"), *tars.glob("*.tar")]:
            client.upload_file(str(path), BUCKET, str(path.relative_to(tmp_path)))
        assert contents(ImageFolder(f"s3://{BUCKET}/images")) == contents(ImageFolder(str(root)))
        assert contents(ImageTars(f"s3://{BUCKET}/tars/train-{{0..1}}.tar")) == contents(ImageTars(str(tars)))


def test_a_folder_behind_a_web_server_is_the_same_source(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images", per_class=2)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote, local = ImageFolder(f"http://127.0.0.1:{server.server_address[1]}/images"), ImageFolder(str(root))
        assert contents(remote) == contents(local)
        assert remote.fingerprint == local.fingerprint
        server.shutdown()


def test_a_web_server_without_parts_of_files_is_named_and_no_tar_is_misread(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(
            ValueError, match=r"train-0.tar was asked for \d+ bytes from \d+ on, but the server sent \d+"
        ):
            ImageTars(f"http://127.0.0.1:{server.server_address[1]}/tars")[0]
        server.shutdown()
